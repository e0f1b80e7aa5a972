"""Samples of a trained sampler: their ids, drawn in chunks that are stored, and their images.

The noise of a chunk is a function of the seed and of the number of its first sample.

Shapes: n samples, b of them in a chunk, N ids each.
"""

import hashlib

import torch

from hparams.groups import SamplingMethod
from hparams.scripts import SAMPLER_ARCHITECTURE
from hparams.settings import names_of
from models.sampling.noise import Streams
from utils.data.cache import Parts
from utils.data.device import bytes_of_image, number_that_fits
from utils.data.pixels import to_uint8
from utils.errors import UserError
from utils.files import load_file
from utils.training.precision import step_seed

CHUNK = 64  # samples whose noise is a function of the seed and of the first one's number
MOST_CHUNKS = 16  # drawn together
DECODED = 16  # images decoded together on a CPU: a fixed number, lest rounding depend on it


@torch.no_grad()
def decode(autoencoder, ids, as_bytes=False):
    """Images [n, C, S, S] of ids [n, N], on the CPU: floats in [0, 1], or uint8 made of them."""
    each = bytes_of_image(autoencoder.generator, ids.shape[1])
    together = number_that_fits(ids.device, each, DECODED, 8 * DECODED)
    images = []
    for part in ids.split(together):
        decoded = autoencoder.decode_indices(part).float()
        images.append(to_uint8(decoded) if as_bytes else decoded.clamp(0, 1))
    return torch.cat(images).cpu()


def bytes_of_sample(H, tokens):
    """An estimate of the bytes that drawing one sample takes, where all tokens are drawn at once:
    logits and what `draw` makes of them, in float64, and the activations of one block."""
    logits = 5 * 8 * tokens * H.codebook_size
    activations = 24 * 4 * tokens * H.bert_n_emb
    attention = 4 * tokens**2 * H.bert_n_head  # of all pairs, where no kernel does without
    cache = 2 * 4 * tokens * H.bert_n_emb * H.bert_n_layers  # of keys and values, autoregressive
    return logits + activations + attention + cache


def sampling_settings(H, checkpoint, precision):
    """All that the ids of samples depend on but their number, a dict; `checkpoint` is the sha256 of
    the sampler's file, which does not show all of its architecture, such as the number of heads."""
    names = SAMPLER_ARCHITECTURE | names_of(SamplingMethod)
    return {name: getattr(H, name) for name in sorted(names)} | dict(
        checkpoint=checkpoint, latent_shape=H.latent_shape, seed=H.seed, chunk=CHUNK,
        precision=str(precision.dtype), device=precision.device.type, torch=torch.__version__,
    )


def drawn_ids(H, sampler, precision, settings, folder, log):
    """Parts of the ids [b, N] of `H.n_samples` samples, stored in a subfolder of `folder` that is
    named by the hash of the `sampling_settings`."""
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    integer = torch.int16 if H.codebook_size <= 2**15 else torch.int32

    def draw(first, n, progress):
        return draw_chunks(H, sampler, precision, [(first, n)], integer)[0]

    def draw_several(spans):
        return draw_chunks(H, sampler, precision, spans, integer)

    def path_of(first, n):
        return folder / key[:16] / f"{first:06d}_{n}.pt"

    each = CHUNK * bytes_of_sample(H, sampler.tokens)
    together = number_that_fits(precision.device, each, 1, MOST_CHUNKS)
    return Parts(H.n_samples, CHUNK, draw, path_of, key, log, "samples",
                 make_several=draw_several, together=together)


@torch.no_grad()
def draw_chunks(H, sampler, precision, spans, integer, **options):
    """[{"ids": [b, N]}] of the chunks `spans`, (first sample, b) each, drawn together. Each has
    noise of its own, so that it gets the ids that it gets alone, up to the network's rounding.
    `options` are more arguments of `sampler.sample`."""
    seeds = [step_seed(H.seed, first, "samples") for first, _ in spans]
    counts = [n for _, n in spans]
    generators = [torch.Generator(precision.device).manual_seed(seed) for seed in seeds]
    with precision.autocast():
        ids = sampler.sample(
            sum(counts), H.temp, rng=Streams(generators, counts), **options
        )
    return [{"ids": part.clone()} for part in ids.to("cpu", integer).split(counts)]


def over_batches(progress, drawn, rest):
    """`progress` of the batch that follows those that are `drawn`, a list of ids [b, N], told of
    all batches as one; `rest` [m, N] are what is known of the ids after it. None stays None."""
    if progress is None:
        return None

    def told(done, total, ids):
        size = len(drawn[0]) if drawn else len(ids)
        batches = len(drawn) + 1 + -(-len(rest) // size)
        progress(len(drawn) * total + done, batches * total, torch.cat((*drawn, ids, rest)))

    return told


def given_ids(H, tokens, log):
    """Parts of the ids [b, N] of the first `H.n_samples` samples that `--latents_path` holds.

    Raises UserError where it does not hold as many, of `tokens` ids below `codebook_size`.
    """
    path, n_samples = H.latents_path, H.n_samples
    ids = load_file(path)
    if not torch.is_tensor(ids) or ids.is_floating_point() or ids.ndim < 2:
        raise UserError(f"--latents_path {path} does not hold a tensor of ids [n, {tokens}]")
    ids = ids.flatten(1)
    if len(ids) < n_samples or ids.shape[1] != tokens:
        raise UserError(f"--latents_path {path} holds {len(ids)} x {ids.shape[1]} ids where "
                        f"{n_samples} x {tokens} are needed: check --n_samples and the autoencoder")
    ids = ids[:n_samples].long()
    if int(ids.min()) < 0 or int(ids.max()) >= H.codebook_size:
        raise UserError(f"--latents_path {path} holds ids outside 0..{H.codebook_size - 1}")

    def look_up(first, n, progress):
        return {"ids": ids[first : first + n]}

    return Parts(n_samples, CHUNK, look_up, None, None, log, "samples")
