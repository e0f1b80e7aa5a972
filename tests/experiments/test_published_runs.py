"""Run folders as the original programs leave them: sampled from, resumed from, measured.

The autoencoder's weights are the golden ones; the sampler's file has the golden keys. Neither has a
hparams.yaml or a manifest, and `stats_<step>` holds NumPy's arrays.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import train_sampler
import train_vqgan
from experiments import calc_approximate_ELBO, calc_FID, calc_VQGAN_FID, get_samples
from helpers import golden
from hparams import get_sampler_hparams, get_vqgan_hparams
from models import VQGAN, AbsorbingDiffusion, Transformer
from models.autoencoder.perceptual import PerceptualDistance
from test_training import assert_identical, files_of, sentence
from utils.evaluation.experiment import read_results
from utils.runs.folder import RunFolder

DATA = "--dataset custom --custom_dataset_path photos --num_workers 0 --no_visdom"
AUTOENCODER = (
    "--img_size 32 --nf 32 --ch_mult 1 2 --res_blocks 1 --attn_resolutions 16 --emb_dim 16 "
    "--codebook_size 48 --ndf 8 --disc_layers 3 --batch_size 2"
)
SAMPLER = (
    f"--sampler absorbing --ae_load_dir vqgan_pub --ae_load_step 5000 {AUTOENCODER} "
    "--attention full --bert_n_emb 48 --bert_n_head 4 --bert_n_layers 3 --total_steps 64"
)
LOAD = f"{DATA} {SAMPLER} --load_dir absorbing_pub --load_step 6000 --ema"


@pytest.fixture(autouse=True)
def published(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    noise = np.random.RandomState(0).randint(0, 256, (12, 40, 40, 3)).astype(np.uint8)
    for index, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index:02}.png")
    torch.manual_seed(0)
    H = get_sampler_hparams(f"{DATA} {SAMPLER}".split())
    vqgan = VQGAN(H, PerceptualDistance())
    state = golden("vqgan_nearest.pt")
    vqgan.load_state_dict(state["state_dict"], strict=False)
    assert set(vqgan.state_dict()) == {*state["state_dict"], *state["perceptual_keys"]}
    leave("vqgan_pub", 5000, {"vqgan": vqgan, "vqgan_ema": vqgan}, {
        "ae_optim": vqgan.ae.parameters(), "disc_optim": vqgan.disc.parameters(),
    })
    sampler = AbsorbingDiffusion(H, Transformer(H), 48, vqgan.ae.codebook)
    assert set(sampler.state_dict()) == set(golden("absorbing.pt")["state_dict"])
    leave("absorbing_pub", 6000, {"absorbing": sampler, "absorbing_ema": sampler},
          {"absorbing_optim": sampler.parameters()})


def leave(run, step, models, optimizers):
    """Write a run's folder as the original programs do."""
    folder = RunFolder(run).create()
    for name, model in models.items():
        torch.save(model.state_dict(), folder.model(name, step))
    for name, parameters in optimizers.items():
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.Adam(parameters, lr=1e-4)
        optimizer.step()
        torch.save(optimizer.state_dict(), folder.model(name, step))
    stats = {"losses": np.array([1.0, 0.5]), "mean_losses": np.float64(0.7), "val_losses": [],
             "steps_per_log": 10, "global_step": step, "elbo": np.arange(5, dtype=np.int64)}
    torch.save(stats, folder.stats(step))


def test_published_runs_are_sampled_from_and_measured():
    get_samples.main(f"{LOAD} --n_samples 3 --sample_steps 8 --log_dir out".split())
    calc_FID.main(f"{LOAD} --n_samples 4 --sample_steps 8 --log_dir out".split())
    calc_approximate_ELBO.main(
        f"{LOAD} --elbo_samples 2 --train_steps 2 --log_dir elbo".split()
    )
    calc_VQGAN_FID.main(
        f"{DATA} {AUTOENCODER} --load_dir vqgan_pub --load_step 5000 --ema --log_dir out".split()
    )
    figures = [result["figures"] for result in read_results(RunFolder("out").results).values()]
    assert [*figures[0]] == ["samples", "of them different"]
    assert figures[1]["FID"] > 0 and figures[2]["PSNR (dB)"] > 0
    log = RunFolder("out").log.read_text()
    assert "stats_6000 is refused" in log and "it is passed over, since no manifest" in log
    assert "which images it was trained on is not recorded" in log
    [result] = read_results(RunFolder("elbo").results).values()
    assert result["held_out"] == {"vqgan_pub": None, "absorbing_pub": None}
    assert "absorbing_pub may have been trained on the validation images too" in (
        RunFolder("elbo").log.read_text()
    )


@pytest.mark.parametrize("script, run, step, flags, optimizer", [
    (train_vqgan, "vqgan_pub", 5000, AUTOENCODER, "ae_optim"),
    (train_sampler, "absorbing_pub", 6000, SAMPLER, "absorbing_optim"),
])
def test_published_runs_go_on(script, run, step, flags, optimizer, capsys, monkeypatch):
    flags = f"{DATA} {flags} --ema --train_steps {step + 2} --load_dir {run} --load_step {step}"
    script.main(f"{flags} --log_dir new".split())
    before = files_of(run, step)
    line = sentence(script.main, f"{flags} --log_dir {run} --resume", capsys, monkeypatch)
    assert f"holds models without manifests, as other programs write them: go on with --load_dir " \
        f"{run} --load_step {step}" in line
    script.main(f"{flags} --log_dir {run}".split())
    assert_identical(before, files_of(run, step))
    assert_identical(files_of("new", step + 2), files_of(run, step + 2))
    [(_, state), *_] = files_of("new", step + 2)[f"{optimizer}_{step + 2}.th"]["state"].items()
    assert float(state["step"]) == 3  # one by the original program, two since
    script.main(f"--log_dir {run} --resume --train_steps {step + 3}".split())
    assert RunFolder(run).complete_steps() == [step + 2, step + 3]


def test_the_settings_of_a_published_autoencoder_may_be_given_as_flags():
    H = get_vqgan_hparams(f"{DATA} {AUTOENCODER}".split())
    assert (H.img_size, H.codebook_size, H.latent_shape) == (32, 48, [1, 16, 16])
