"""The autoencoder in other number and memory formats computes the same function."""

from types import SimpleNamespace

import pytest
import torch

from models import VQGAN
from models.autoencoder.formats import in_precision

TINY = dict(
    img_size=16, n_channels=3, nf=32, ch_mult=[1, 1], res_blocks=1, attn_resolutions=[8],
    emb_dim=8, codebook_size=20, latent_shape=[1, 8, 8], quantizer="nearest", beta=0.25, ndf=4,
    disc_layers=2, disc_weight_max=1.0, disc_start_step=10, diff_aug=False, perceptual_weight=0.0,
    perceptual_range="0_1", gumbel_kl_weight=1e-8, gumbel_straight_through=False,
)


def tiny(**changes):
    torch.manual_seed(0)
    return VQGAN(SimpleNamespace(**(TINY | changes)))


def images(size=16, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def frozen(**changes):
    return tiny(**changes).ae.requires_grad_(False).eval()


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_copy_encodes_and_decodes_in_float32(quantizer, dtype):
    ae = frozen(quantizer=quantizer)
    ae.weights_hash = "abc"
    half = in_precision(ae, dtype)
    assert half.weights_hash == "abc" and torch.equal(half.codebook, ae.codebook)
    rounding = torch.finfo(dtype).eps
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            z_q, _, _, ids = half.encode(images())
            x_hat = half.decode_indices(ids, (8, 8))
        z, expected = ae.encoder(images()), ae.decode_indices(ids)
        assert z_q.dtype == x_hat.dtype == torch.float32
        assert 0 < (half.encoder(images()) - z).abs().max() < 8 * rounding * z.abs().max()
        assert 0 < (x_hat - expected).abs().max() < 8 * rounding * expected.abs().max()
        # Not rounded to 8 bits of mantissa: that would leave few different values.
        assert x_hat.unique().numel() > 0.9 * x_hat.numel()
        assert torch.equal(ids, half.quantize(half.encoder(images()))[3])


def test_a_half_copy_leaves_the_autoencoder_as_it_was():
    ae = frozen()
    before = {name: value.clone() for name, value in ae.state_dict().items()}
    half = in_precision(ae, torch.bfloat16)
    assert all(torch.equal(before[name], value) for name, value in ae.state_dict().items())
    assert all(p.dtype == torch.float32 for p in ae.parameters())
    assert half.encoder.body[0].weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in half.parameters()) and not half.training
    assert in_precision(ae, torch.float32) is ae
