"""Building models from settings and files: what does not fit, where LPIPS' weights come from."""

import numpy as np
import pytest
import torch
import torchvision

from helpers import ON_DIGITS
from hparams import SettingsError, UserError, get_sampler_hparams, get_vqgan_hparams
from models import VQGAN
from utils.files import save_file
from utils.logging.logger import RunLogger
from utils.runs.folder import RunFolder
from utils.training import build
from utils.training.build import (
    build_both, build_vqgan, check_models, load_autoencoder, load_perceptual, load_sampler,
)
from utils.training.checkpoints import Checkpoints, load_weights, unwrapped
from utils.training.precision import Precision

FLAGS = (
    f"{ON_DIGITS} --img_size 16 --ch_mult 1 1 --attn_resolutions 8 "
    "--disc_layers 1 --perceptual_weight 1"
).split()


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLogger(RunFolder("run")) as log:
        yield log


@pytest.fixture
def vgg(monkeypatch):
    """The convolutions of torchvision's VGG16 with random weights, as in its file."""
    with torch.device("meta"):
        network = torchvision.models.vgg16()
    torch.manual_seed(0)
    return {
        key: torch.randn(value.shape) * 0.05
        for key, value in network.state_dict().items() if key.startswith("features.")
    }


def no_download(*arguments, **options):
    raise AssertionError("downloaded")


def test_perceptual_weight_0_needs_no_lpips(log, monkeypatch):
    monkeypatch.setattr(build, "download_vgg16", no_download)
    monkeypatch.setattr(build, "PerceptualDistance", no_download)
    H = get_vqgan_hparams([*FLAGS, "--perceptual_weight", "0"])
    assert not any(key.startswith("perceptual") for key in build_vqgan(H, log).state_dict())


def test_lpips_loads_from_a_local_file_and_from_a_checkpoint(log, vgg, monkeypatch):
    monkeypatch.setattr(build, "download_vgg16", no_download)
    save_file(vgg, "vgg16.pth")
    vqgan = build_vqgan(get_vqgan_hparams([*FLAGS, "--vgg_weights", "vgg16.pth"]), log)
    weights = vqgan.state_dict()["perceptual.net.slice1.0.weight"]
    assert torch.equal(weights, vgg["features.0.weight"])
    images = torch.rand(2, 1, 16, 16)
    assert float(vqgan.perceptual_loss(images, images.flip(-1))) > 0
    RunFolder("old").create()
    save_file(vqgan.state_dict(), RunFolder("old").model("vqgan", 5))
    build_vqgan(get_vqgan_hparams([*FLAGS, "--load_dir", "old", "--load_step", "5"]), log)


def test_a_wrong_vgg_file_is_named(log, vgg):
    del vgg["features.28.weight"]
    save_file(vgg, "vgg16.pth")
    with pytest.raises(UserError, match="vgg16.pth.*features.28.weight"):
        build_vqgan(get_vqgan_hparams([*FLAGS, "--vgg_weights", "vgg16.pth"]), log)


def test_a_failed_download_names_the_alternatives(log, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.VGG16_Weights, "get_state_dict", refuse)
    with pytest.raises(UserError, match="--vgg_weights.*--perceptual efficientnet_lite0"):
        build_vqgan(get_vqgan_hparams(FLAGS), log)


def test_a_checkpoint_with_lpips_loads_without_it(log, vgg):
    """Published files hold LPIPS, which --perceptual_weight 0 has no use for, and vice versa."""
    save_file(vgg, "vgg16.pth")
    with_lpips = build_vqgan(get_vqgan_hparams([*FLAGS, "--vgg_weights", "vgg16.pth"]), log)
    without = build_vqgan(get_vqgan_hparams([*FLAGS, "--perceptual_weight", "0"]), log)
    load_weights(without, with_lpips.state_dict(), "file", optional=["perceptual."])
    key = "ae.encoder.blocks.0.weight"
    assert torch.equal(without.state_dict()[key], with_lpips.state_dict()[key])
    load_weights(with_lpips, without.state_dict(), "file", optional=["perceptual."])
    with pytest.raises(UserError, match="unknown perceptual"):
        load_weights(without, with_lpips.state_dict(), "file")


def test_load_perceptual_prefers_the_file_then_the_checkpoint(log, vgg, monkeypatch):
    """From the file asked for, else from the autoencoder's own, else downloaded."""
    flags = "--sampler absorbing --kernel_sizes 3 --ae_load_dir ae --ae_load_step 5".split()
    H = get_sampler_hparams([*FLAGS, *flags])
    monkeypatch.setattr(build, "download_vgg16", no_download)
    save_file(vgg, "vgg16.pth")
    H.vgg_weights = "vgg16.pth"
    torch.manual_seed(1)
    images = torch.rand(2, 3, 16, 16)
    from_file = load_perceptual(H, torch.device("cpu"), log)(images, images.flip(0))
    RunFolder("ae").create()
    vqgan = build_vqgan(get_vqgan_hparams([*FLAGS, "--vgg_weights", "vgg16.pth"]), log)
    save_file(vqgan.state_dict(), RunFolder("ae").model("vqgan", 5))
    H.vgg_weights = None
    from_checkpoint = load_perceptual(H, torch.device("cpu"), log)(images, images.flip(0))
    assert torch.equal(from_file, from_checkpoint) and from_file.min() > 0
    save_file(vqgan.ae.state_dict(), RunFolder("ae").model("vqgan", 5))
    with pytest.raises(AssertionError, match="downloaded"):
        load_perceptual(H, torch.device("cpu"), log)


# --- files that other programs have written ------------------------------------------------------

WRAPPINGS = {
    "DataParallel": ("module.", lambda state: state, ["without the prefix 'module.'"]),
    "torch.compile": ("_orig_mod.", lambda state: state, ["without the prefix '_orig_mod.'"]),
    "both": ("module._orig_mod.", lambda state: state, ["'module.'", "'_orig_mod.'"]),
    "state_dict": ("", lambda state: {"epoch": 3, "state_dict": state, "loss": torch.ones(1)},
                   ["from below the key 'state_dict'"]),
    "model": ("", lambda state: {"model": state, "optimizer": {"state": {}}}, ["key 'model'"]),
    "model_state_dict": ("module.", lambda state: {"model_state_dict": state, "args": {"lr": 1}},
                         ["key 'model_state_dict'", "prefix 'module.'"]),
}
PRIOR_FLAGS = (
    "--sampler absorbing --kernel_sizes 3 --bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1 "
    "--ae_load_dir ae --ae_load_step 5 --load_dir prior --load_step 5"
).split()


def wrapped(state, how):
    prefix, wrap, _ = WRAPPINGS[how]
    return wrap({prefix + key: value for key, value in state.items()})


def random_state(model, seed=1):
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) if v.is_floating_point() else v
            for k, v in model.state_dict().items()}


def log_text():
    return RunFolder("run").log.read_text()


@pytest.mark.parametrize("how", WRAPPINGS)
def test_weights_that_another_program_has_wrapped_are_restored(log, how):
    H = get_vqgan_hparams([*FLAGS, "--perceptual_weight", "0", "--load_dir", "old",
                           "--load_step", "5"])
    vqgan = VQGAN(H)
    state = random_state(vqgan)
    save_file(wrapped(state, how), RunFolder("old").create().model("vqgan", 5))
    scaler = Precision(False, torch.device("cpu")).scaler
    Checkpoints(log.folder, {"vqgan": vqgan}, {}, scaler).restore(H, log)
    assert all(torch.equal(vqgan.state_dict()[key], value) for key, value in state.items())
    (said,) = [line for line in log_text().splitlines() if "another program" in line]
    assert "vqgan_5.th" in said and all(part in said for part in WRAPPINGS[how][2])


@pytest.mark.parametrize("how", WRAPPINGS)
def test_wrapped_autoencoders_and_samplers_are_read(log, how):
    H = get_sampler_hparams([*FLAGS[:-2], *PRIOR_FLAGS])
    state = random_state(VQGAN(H))
    save_file(wrapped(state, how), RunFolder("ae").create().model("vqgan", 5))
    autoencoder = load_autoencoder(H, torch.device("cpu"), log)
    prior = random_state(build_both(H), seed=2)
    save_file(wrapped(prior, how), RunFolder("prior").create().model("absorbing", 5))
    sampler = load_sampler(H, autoencoder, torch.device("cpu"), log)
    assert torch.equal(autoencoder.codebook, state["ae.quantize.embedding.weight"])
    assert all(torch.equal(sampler.state_dict()[key], value) for key, value in prior.items())
    assert log_text().count("was wrapped by another program") == 2


@pytest.mark.parametrize("how", WRAPPINGS)
def test_lpips_trunk_is_read_from_a_wrapped_file(log, vgg, how):
    save_file(wrapped(vgg, how), "vgg16.pth")
    vqgan = build_vqgan(get_vqgan_hparams([*FLAGS, "--vgg_weights", "vgg16.pth"]), log)
    weights = vqgan.state_dict()["perceptual.net.slice1.0.weight"]
    assert torch.equal(weights, vgg["features.0.weight"])
    assert "vgg16.pth was wrapped by another program" in log_text()


def test_a_sound_state_dict_is_left_as_it_is_without_a_word(log):
    state = {"a": torch.ones(1), "module.b": torch.ones(1), "model": torch.ones(1)}
    assert unwrapped(state, "file", log) is state
    assert "another program" not in log_text()


def test_what_is_no_wrapped_model_is_still_refused(log):
    model = torch.nn.Linear(1, 1)
    state, itself = model.state_dict(), {}
    itself["model"] = itself
    for content, says in [
        ({"model": state, "state_dict": state}, "'model' names no tensor"),  # which one?
        ({"weights": state}, "'weights' names no tensor"),
        ({"model": [state]}, "'model' names no tensor"),
        ({"state_dict": {"x": torch.ones(1)}}, "lacks weight"),
        ({"state_dict": {**state, 1: torch.ones(1)}}, "'1' names no tensor"),
        ({"module.weight": state["weight"], "bias": state["bias"]}, "lacks weight"),
        ({"module.weight": state["weight"]}, "lacks bias"),
        (itself, "'model' names no tensor"), ([], "no state dict"), (None, "no state dict"),
    ]:
        with pytest.raises(UserError, match=f"file .*{says}"):
            load_weights(model, unwrapped(content, "file", log), "file")


def published_run(name, models):
    """A run folder like those of the original programs: no manifest, numpy values in its stats."""
    folder = RunFolder(name).create()
    for model, state in models.items():
        save_file(state, folder.model(model, 5))
    torch.save({"losses": np.array([1.0]), "elbo": np.float64(2)}, folder.stats(5))
    return folder


def test_stats_of_the_original_programs_are_passed_over_and_the_weights_load(log):
    H = get_vqgan_hparams([*FLAGS, "--perceptual_weight", "0", "--load_dir", "old",
                           "--load_step", "5"])
    vqgan = VQGAN(H)
    state = random_state(vqgan)
    folder = published_run("old", {"vqgan": state})
    scaler = Precision(False, torch.device("cpu")).scaler
    checkpoints = Checkpoints(log.folder, {"vqgan": vqgan}, {}, scaler)
    assert checkpoints.restore(H, log) == {}
    assert all(torch.equal(vqgan.state_dict()[key], value) for key, value in state.items())
    (said,) = [line for line in log_text().splitlines() if "stats_5" in line]
    assert "WARNING" in said and "passed over, since no manifest" in said
    folder.manifest(5).write_text('{"files": {}}')
    with pytest.raises(UserError, match="stats_5 is refused"):
        checkpoints.restore(H, log)


def test_a_sampler_beside_stats_of_the_original_programs_is_read(log):
    H = get_sampler_hparams([*FLAGS[:-2], *PRIOR_FLAGS])
    save_file(VQGAN(H).state_dict(), RunFolder("ae").create().model("vqgan", 5))
    autoencoder = load_autoencoder(H, torch.device("cpu"), log)
    folder = published_run("prior", {"absorbing": build_both(H).state_dict()})
    load_sampler(H, autoencoder, torch.device("cpu"), log)
    assert "passed over, since no manifest" in log_text()
    folder.manifest(5).write_text('{"files": {}}')
    with pytest.raises(UserError, match="stats_5 is refused"):
        load_sampler(H, autoencoder, torch.device("cpu"), log)


# --- settings that do not fit together -----------------------------------------------------------

DIGITS = ON_DIGITS.split()
PRIOR = [*DIGITS, "--sampler", "absorbing", "--ae_load_dir", "ae", "--ae_load_step", "5"]


@pytest.mark.parametrize("flags, says", [
    ("--latent_shape 1 4 4", "--latent_shape 1 4 4 does not follow from --img_size 32"),
    ("--img_size 31", "--img_size 31 cannot be halved"),
    ("--nf 24", "--nf 24 x --ch_mult 1 = 24 is no multiple of --norm_groups 32"),
    ("--attn_resolutions 7", "--attn_resolutions 7 never occurs"),
    ("--disc_layers 5", "--disc_layers 5 leaves nothing"),
    ("--img_size 8 --attn_resolutions 8 --disc_layers 1 --perceptual_weight 1",
     "--perceptual lpips needs images of 16 pixels"),
])
def test_an_impossible_autoencoder_names_the_flag(flags, says):
    with pytest.raises(SettingsError) as error:
        check_models(get_vqgan_hparams([*DIGITS, *flags.split()]), VQGAN)
    assert says in str(error.value) and "`" not in str(error.value)


@pytest.mark.parametrize("flags, says", [
    ("--bert_n_head 7", "--bert_n_head 7 does not divide --bert_n_emb 128"),
    ("--kernel_sizes 3 9", "--kernel_sizes 9 x --dilations 1 = 9 is larger than the 8x8 grid"),
    ("--kernel_sizes 3 5 --dilations 1 2", "--kernel_sizes 5 x --dilations 2 = 10 is larger"),
    ("--kernel_sizes 3 4", "--kernel_sizes must be odd"),
    ("--kernel_sizes 3 5 7 --dilations 1 1", "must be equally many"),
    ("--kernel_sizes 3 3 3 3 3 3 3 3 3",
     "9 groups of --kernel_sizes and --dilations need at least 9 heads"),
    ("--block_size 63", "--block_size 63 is not the number of ids"),
    ("--latent_shape 64", "--latent_shape 64 does not follow from --img_size 32"),
    ("--attention full --position rpb", "absolute positions only"),
    ("--position rope --bert_n_emb 24 --bert_n_head 4", "a multiple of 4, not 24 / 4"),
    ("--sampler autoregressive --attention hydra", "looks ahead"),
    ("--attn_pdrop 0.1", "--attn_pdrop must be 0: hydra attention has no attention dropout"),
    ("--nf 24", "--nf 24 x --ch_mult 1 = 24 is no multiple of --norm_groups 32"),
])
def test_an_impossible_sampler_names_the_flag(flags, says):
    with pytest.raises(SettingsError) as error:
        check_models(get_sampler_hparams([*PRIOR, *flags.split()]), build_both)
    assert says in str(error.value) and "`" not in str(error.value)


def test_lists_without_an_entry_and_impossible_sizes_are_a_sentence():
    for name, value in (("ch_mult", []), ("nf", 2**50)):
        H = get_vqgan_hparams(DIGITS)
        setattr(H, name, value)
        with pytest.raises(SettingsError, match="these settings make no model"):
            check_models(H, VQGAN)
