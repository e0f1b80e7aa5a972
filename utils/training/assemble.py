"""Build models from hyperparameters and fill them from files."""

from utils.errors import UserError
from utils.runs.folder import RunFolder
from models import AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.autoencoder.autoencoder import VQAutoEncoder
from models.autoencoder.perceptual import build_perceptual, load_vgg16
from models.autoencoder.vqgan import VQGAN
from utils.training.checkpoints import (
    check_state_dict, load_checkpoint, load_file, load_stats, load_weights, weights_hash,
)


def build_vqgan(H, log):
    """VQGAN with LPIPS where `perceptual_weight` asks for it.

    LPIPS' trunk comes from `--vgg_weights`, from torchvision's download otherwise, and from the
    checkpoint itself when one is loaded. Raises UserError where none of these is to be had.
    """
    if H.perceptual_weight == 0:
        return VQGAN(H)
    perceptual = build_perceptual()
    loads = H.load_step and has_perceptual(RunFolder(H.load_dir).model("vqgan", H.load_step))
    if H.vgg_weights or not loads:
        fill_trunk(perceptual, H.vgg_weights, log, "--perceptual_weight 0")
    return VQGAN(H, perceptual)


def load_perceptual(H, device, log):
    """LPIPS to measure with, its trunk from `--vgg_weights`, from the autoencoder's file where
    that holds it, or downloaded; UserError where none of these is to be had."""
    perceptual, path = build_perceptual(), autoencoder_path(H)
    state = {} if H.vgg_weights else load_checkpoint(path)
    check_state_dict(state, path)
    keys = [key for key in state if key.startswith("perceptual.")]
    if keys:
        own = {key.removeprefix("perceptual."): state[key] for key in keys}
        load_weights(perceptual, own, path)
        log.info(f"LPIPS: {path}")
    else:
        fill_trunk(perceptual, H.vgg_weights, log, "--spaces pixels")
    return perceptual.to(device)


def fill_trunk(perceptual, vgg_weights, log, without):
    """Fill LPIPS' trunk from the file `vgg_weights`, or from torchvision's download where that is
    None; UserError names `without`, the flag that does without LPIPS."""
    if vgg_weights:
        state = load_file(vgg_weights)
        check_state_dict(state, vgg_weights)
        try:
            load_vgg16(perceptual, state)
        except ValueError as error:
            raise UserError(f"--vgg_weights {vgg_weights}: {error}") from None
        log.info(f"LPIPS: {vgg_weights}")
    else:
        log.info("LPIPS: loading torchvision's VGG16 weights (528 MB where not downloaded yet)")
        load_vgg16(perceptual, download_vgg16(without))


def has_perceptual(path):
    """Whether a VQGAN's file holds LPIPS' trunk."""
    state = load_file(path)
    check_state_dict(state, path)
    return any(key.startswith("perceptual.net.") for key in state)


def download_vgg16(without):
    """torchvision's VGG16 state dict, downloaded once; UserError without a connection."""
    from torchvision.models import VGG16_Weights

    try:
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise UserError(
            f"torchvision's VGG16 weights do not download ({error}): give a local file with "
            f"--vgg_weights, or do without LPIPS with {without}"
        ) from None


def autoencoder_path(H):
    """The file of the autoencoder in `--ae_load_dir`: its EMA where it has one.

    Whether the sampler has an EMA does not matter: all that is done with a sampler must use the
    autoencoder whose ids it learned.
    """
    run, step = RunFolder(H.ae_load_dir), H.ae_load_step
    average = run.model("vqgan_ema", step)
    return average if average.exists() else run.model("vqgan", step)


def load_autoencoder(H, device, log, path=None):
    """The trained autoencoder in `path` (None: in `autoencoder_path`), frozen."""
    path = path or autoencoder_path(H)
    state = load_checkpoint(path)
    check_state_dict(state, path)
    autoencoder = VQAutoEncoder(H)
    others = ("disc.", "perceptual.")
    state = {k.removeprefix("ae."): v for k, v in state.items() if not k.startswith(others)}
    load_weights(autoencoder, state, path)
    log.info(f"autoencoder: {path}")
    return autoencoder.requires_grad_(False).eval().to(device)


def build_sampler(H, autoencoder):
    """The prior that H describes, over the ids of `autoencoder`."""
    codebook = codebook_vectors(autoencoder)
    if H.sampler == "autoregressive":
        return AutoregressiveTransformer(H, codebook)
    return AbsorbingDiffusion(H, Transformer(H), H.codebook_size, codebook)


def codebook_vectors(autoencoder):
    """The codebook [codebook_size, emb_dim] of either quantizer."""
    quantize = autoencoder.quantize
    table = quantize.embedding if hasattr(quantize, "embedding") else quantize.embed
    return table.weight.detach().clone()


def check_autoencoder(autoencoder, stats, path):
    """Raise UserError when the sampler's `stats` say that it learned another autoencoder's ids."""
    if "autoencoder" in stats and stats["autoencoder"] != weights_hash(autoencoder):
        raise UserError(
            f"{path} was trained on the ids of another autoencoder: check --ae_load_dir and "
            f"--ae_load_step"
        )


def sampler_path(H):
    """The file of the sampler of `--load_dir`: its EMA with `--ema`."""
    return RunFolder(H.load_dir).model(f"{H.sampler}_ema" if H.ema else H.sampler, H.load_step)


def load_sampler(H, autoencoder, device, log):
    """The trained sampler of `--load_dir`: its EMA with `--ema`, which must then be there."""
    run, path = RunFolder(H.load_dir), sampler_path(H)
    sampler = build_sampler(H, autoencoder)
    load_weights(sampler, load_checkpoint(path), path)
    if run.stats(H.load_step).exists():
        check_autoencoder(autoencoder, load_stats(run, H.load_step), path)
    log.info(f"sampler: {path}")
    return sampler.requires_grad_(False).eval().to(device)
