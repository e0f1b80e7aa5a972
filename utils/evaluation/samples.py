"""Samples of a trained sampler: their ids, drawn in chunks that are stored, and their images.

The noise of a chunk is a function of the seed and of the number of its first sample.

Shapes: n samples, b of them in a chunk, N ids each.
"""

import hashlib

import torch

from hparams.groups import SamplingMethod
from hparams.scripts import SAMPLER_ARCHITECTURE
from hparams.settings import names_of
from utils.data.cache import Parts
from utils.errors import UserError
from utils.files import load_file
from utils.training.precision import seed_step

CHUNK = 64  # samples drawn together
DECODED = 16  # images decoded together: a fixed number, lest rounding depend on the batch size


@torch.no_grad()
def decode(autoencoder, ids):
    """Images [n, C, S, S] in [0, 1], on the CPU, of ids [n, N]."""
    images = [autoencoder.decode_indices(part).cpu() for part in ids.split(DECODED)]
    return torch.cat(images).float().clamp(0, 1)


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

    @torch.no_grad()
    def draw(first, n, progress):
        seed_step(H.seed, first, "samples")
        with precision.autocast():
            return {"ids": sampler.sample(n, H.temp).to("cpu", integer)}

    def path_of(first, n):
        return folder / key[:16] / f"{first:06d}_{n}.pt"

    return Parts(H.n_samples, CHUNK, draw, path_of, key, log, "samples")


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
