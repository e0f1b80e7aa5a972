"""The samplers' modules agree with what the original programs compute (tests/data)."""

import pytest
import torch

from helpers import assert_close, golden
from hparams import get_sampler_hparams
from models import (
    AbsorbingDiffusion, AutoregressiveTransformer, HydraNeighborhoodAttention, Transformer,
)
from models.prior.absorbing_diffusion import diffusion_losses

SMALL = (
    "--dataset ffhq --ae_load_dir none --ae_load_step 1 --attention full --img_size 32 "
    "--ch_mult 1 1 2 --latent_shape 1 8 8 --codebook_size 48 --emb_dim 16 --bert_n_emb 48 "
    "--bert_n_head 4 --bert_n_layers 3 --block_size 64 --total_steps 64"
).split()


@pytest.fixture(scope="module")
def absorbing():
    data = golden("absorbing.pt")
    H = get_sampler_hparams(["--sampler", "absorbing", *SMALL])
    model = AbsorbingDiffusion(H, Transformer(H), H.codebook_size, torch.zeros(48, 16))
    model.load_state_dict(data["state_dict"], strict=True)
    return data, model.eval()


def test_parameters_are_numbered_as_in_published_optimisers(absorbing):
    data, model = absorbing
    buffers = dict(model.named_buffers())
    names = [name for name, _ in model.named_parameters()]
    assert names == [key for key in data["state_dict"] if key not in buffers]


def test_absorbing_logits(absorbing):
    data, model = absorbing
    x_t = data["x_0"].masked_fill(data["mask"], model.mask_id)
    assert torch.equal(x_t, data["x_t"])
    with torch.no_grad():
        assert_close(model._denoise_fn(x_t), data["logits"])


@pytest.mark.parametrize("name", ["elbo", "reweighted_elbo", "mlm"])
def test_absorbing_losses(absorbing, name):
    data, model = absorbing
    losses = diffusion_losses(data["logits"], data["x_0"], data["mask"], data["t"], 64)
    assert_close(losses[name].mean(), data[f"loss_{name}"])
    if name == "elbo":
        assert_close(losses["elbo"].mean(), data["vb_loss"])


def test_autoregressive():
    data = golden("autoregressive.pt")
    H = get_sampler_hparams(["--sampler", "autoregressive", *SMALL])
    model = AutoregressiveTransformer(H, torch.zeros(48, 16))
    model.load_state_dict(data["state_dict"], strict=True)
    model.eval()
    with torch.no_grad():
        assert_close(model.net(data["x"][:, :-1]), data["logits"])
        assert_close(model(data["x"])["loss"], data["loss"])


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("backend", [None, "dense", "tiled", "flex"])
def test_hydra_modules(index, backend):
    case = golden("hydra_attention.pt")[index]
    module = HydraNeighborhoodAttention(
        case["dim"], case["kernel_sizes"], case["num_heads"], dilations=case["dilations"],
        backend=backend,
    )
    module.load_state_dict(case["state_dict"], strict=True)
    with torch.no_grad():
        assert_close(module(case["x"]), case["out"])
