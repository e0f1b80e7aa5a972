"""Build models from hyperparameters, and fill them from the files of runs."""

import re

import torch

from models import AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.autoencoder.autoencoder import VQAutoEncoder
from models.autoencoder.formats import to_fast_format
from models.autoencoder.perceptual import (
    EfficientNetDistance, PerceptualDistance, lite0_weights, load_vgg16,
)
from models.autoencoder.vqgan import VQGAN
from utils.errors import SettingsError, UserError
from utils.files import load_file, weights_hash
from utils.runs.folder import RunFolder
from utils.runs.manifest import is_saved, load_checkpoint, place_of, read_stats
from utils.training.checkpoints import check_architecture, check_state_dict, load_weights, unwrapped


def check_models(H, build):
    """Call `build(H)` without weights; SettingsError, which names the --flags, where it cannot."""
    try:
        with torch.device("meta"):
            build(H)
    except ValueError as error:
        raise SettingsError(re.sub(r"`(\w+)`", r"--\1", str(error))) from None
    except (IndexError, RuntimeError) as error:  # of empty lists, and sizes beyond any memory
        reason = str(error).splitlines()[0]
        raise SettingsError(f"these settings make no model ({reason})") from None


def build_sampler(H, codebook):
    """The prior that H describes, over the ids of a `codebook` [K, D]."""
    if H.sampler == "autoregressive":
        return AutoregressiveTransformer(H, codebook)
    return AbsorbingDiffusion(H, Transformer(H), H.codebook_size, codebook)


def build_both(H):
    """The sampler that H describes, and the autoencoder that it needs."""
    return build_sampler(H, VQAutoEncoder(H).codebook)


def build_vqgan(H, log):
    """VQGAN, with the distance `perceptual` where `perceptual_weight` asks for it, and the network
    of the discriminator where `disc_input` does.

    LPIPS' trunk comes from `--vgg_weights`, else from the checkpoint to be loaded, else from
    torchvision's download; UserError where none of these is to be had.
    """
    lite0, is_compared = None, H.perceptual_weight > 0
    if H.disc_input == "features" or is_compared and H.perceptual == "efficientnet_lite0":
        lite0 = efficientnet_distance()
    if not is_compared or H.perceptual == "efficientnet_lite0":
        return VQGAN(H, lite0, lite0)
    perceptual = PerceptualDistance()
    path = RunFolder(H.load_dir).model("vqgan", H.load_step)
    if H.vgg_weights or not (H.load_step and lpips_weights(path)):
        fill_trunk(perceptual, H.vgg_weights, log, "--perceptual efficientnet_lite0")
    return VQGAN(H, perceptual, lite0)


def efficientnet_distance():
    """The perceptual distance on EfficientNet-Lite0, with the weights that are installed."""
    perceptual = EfficientNetDistance()
    perceptual.net.load_state_dict(load_file(lite0_weights()))
    return perceptual


def lpips_weights(path):
    """{LPIPS' own key: weight} of those in a VQGAN's file; {} where it holds none."""
    state = check_state_dict(unwrapped(load_checkpoint(path), path), path)
    prefix = "perceptual."
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def load_perceptual(H, device, log):
    """LPIPS to measure with, its trunk from `--vgg_weights`, else from the autoencoder's file, else
    downloaded; UserError where none of these is to be had."""
    perceptual, path = PerceptualDistance(), autoencoder_path(H)
    state = {} if H.vgg_weights else lpips_weights(path)
    if state:
        load_weights(perceptual, state, path)
        log.info(f"LPIPS: {path}")
    else:
        fill_trunk(perceptual, H.vgg_weights, log, "--spaces pixels")
    return perceptual.to(device)


def fill_trunk(perceptual, vgg_weights, log, alternative):
    """Fill LPIPS' trunk from the file `vgg_weights`, or from torchvision's download without one;
    UserError names `alternative`, the flag that does without LPIPS."""
    if vgg_weights:
        try:
            state = unwrapped(load_file(vgg_weights), vgg_weights, log)
            load_vgg16(perceptual, check_state_dict(state, vgg_weights))
        except ValueError as error:
            raise UserError(f"--vgg_weights {vgg_weights}: {error}") from None
        log.info(f"LPIPS: {vgg_weights}")
    else:
        log.info("LPIPS: loading torchvision's VGG16 weights (528 MB where not downloaded yet)")
        load_vgg16(perceptual, download_vgg16(alternative))


def download_vgg16(alternative):
    """torchvision's VGG16 state dict, downloaded once; UserError without a connection."""
    from torchvision.models import VGG16_Weights

    try:
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise UserError(
            f"torchvision's VGG16 weights do not download ({error}): give a local file with "
            f"--vgg_weights, or do without LPIPS with {alternative}"
        ) from None


def autoencoder_path(H):
    """The file of the autoencoder in `--ae_load_dir`: its EMA where it has one.

    With or without --ema, since a sampler needs the autoencoder whose ids it learned.
    """
    folder, step = RunFolder(H.ae_load_dir), H.ae_load_step
    average = folder.model("vqgan_ema", step)
    return average if is_saved(average) else folder.model("vqgan", step)


def load_autoencoder(H, device, log, path=None):
    """The trained autoencoder in `path` (None: in `autoencoder_path`), frozen.

    Its attribute `weights_hash` is the hash of its weights, by which ids are tied to it.
    """
    path = path or autoencoder_path(H)
    state = check_state_dict(unwrapped(load_checkpoint(path), path, log), path)
    others = ("disc.", "perceptual.")
    state = {k.removeprefix("ae."): v for k, v in state.items() if not k.startswith(others)}
    autoencoder = VQAutoEncoder(H)
    load_weights(autoencoder, state, path)
    check_architecture(H, stats_beside(path, log), path)
    autoencoder.weights_hash = weights_hash(autoencoder)
    log.info(f"autoencoder: {path}")
    return to_fast_format(autoencoder.requires_grad_(False).eval().to(device), device)


def stats_beside(path, log):
    """The stats of the checkpoint that a model's file belongs to."""
    folder, _, step = place_of(path)
    return read_stats(folder, step, log)


def check_autoencoder(autoencoder, stats, path):
    """Raise UserError where a sampler's `stats` name another autoencoder's weights."""
    if stats.get("autoencoder", autoencoder.weights_hash) != autoencoder.weights_hash:
        raise UserError(f"{path} was trained on the ids of another autoencoder: check "
                        f"--ae_load_dir and --ae_load_step")


def sampler_path(H):
    """The file of the sampler of `--load_dir`: its EMA with `--ema`."""
    return RunFolder(H.load_dir).model(f"{H.sampler}_ema" if H.ema else H.sampler, H.load_step)


def load_sampler(H, autoencoder, device, log):
    """The trained sampler of `--load_dir`: its EMA with `--ema`, which must then be there."""
    path = sampler_path(H)
    sampler = build_sampler(H, autoencoder.codebook)
    load_weights(sampler, unwrapped(load_checkpoint(path), path, log), path)
    stats = stats_beside(path, log)
    check_architecture(H, stats, path)
    check_autoencoder(autoencoder, stats, path)
    log.info(f"sampler: {path}")
    return sampler.requires_grad_(False).eval().to(device)
