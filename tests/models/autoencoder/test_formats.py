"""The autoencoder in other number and memory formats computes the same function."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from models import VQGAN
from models.autoencoder.autoencoder import Upsample, doubled
from models.autoencoder.formats import in_precision, to_fast_format

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


def gradients_of(model, **options):
    """(loss, every gradient of the autoencoder) of one training step's objective."""
    torch.manual_seed(2)
    loss, _, _ = model.train().generator_losses(images(), 10)
    loss.backward()
    return loss.detach(), [p.grad for p in model.ae.parameters() if p.grad is not None]


def assert_same_step(model, expected, tolerance=1e-4):
    loss, gradients = gradients_of(model)
    torch.testing.assert_close(loss, expected[0])
    assert len(gradients) == len(expected[1])
    scale = max(gradient.abs().max() for gradient in expected[1])
    for actual, wanted in zip(gradients, expected[1]):
        assert (actual - wanted).abs().max() < tolerance * scale


def test_the_fast_format_of_cuda_computes_the_same():
    model = tiny()
    fast, state = to_fast_format(tiny(), torch.device("cuda")), model.state_dict()
    assert fast.ae.encoder.blocks[0].weight.stride() != model.ae.encoder.blocks[0].weight.stride()
    for name, value in fast.state_dict().items():
        assert value.shape == state[name].shape and torch.equal(value, state[name])
    assert_same_step(fast, gradients_of(model))


@pytest.mark.parametrize("channels_last", [False, True])
def test_activations_have_the_format_of_the_weights(channels_last):
    model, seen = tiny().ae, []
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=wanted)
    for network in (model.encoder, model.generator):
        for block in network.blocks:
            block.register_forward_hook(
                lambda _, __, output: seen.append(output.is_contiguous(memory_format=wanted))
            )
    model(images().contiguous(memory_format=torch.channels_last))
    assert len(seen) > 10 and all(seen)


def test_the_fast_format_of_a_cpu_leaves_the_autoencoder():
    model = to_fast_format(tiny(), torch.device("cpu"))
    assert all(p.is_contiguous() for p in model.parameters())


def test_doubled_kernels_are_the_convolution_of_a_doubled_image():
    torch.manual_seed(0)
    block, x = Upsample(5), torch.randn(2, 5, 3, 4)
    expected = block.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(block(x), expected)
    assert doubled(block.conv.weight).shape == (5, 5, 4, 4)


def test_checkpointed_blocks_have_the_same_gradients():
    expected = gradients_of(tiny())
    model, passes = tiny(), []
    model.checkpoint_blocks()
    first = model.ae.generator.blocks[1]
    first.conv1.register_forward_hook(lambda *_: passes.append(1))
    loss, gradients = gradients_of(model)
    assert len(passes) == 2  # the second time in the backward pass
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1]))
    model.eval()
    model.ae(images())
    assert len(passes) == 3


@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiled_networks_are_one_graph_each_with_the_same_gradients(checkpoints):
    expected, model = gradients_of(tiny()), tiny()
    keys = list(model.state_dict())
    model.checkpoint_blocks(checkpoints)
    torch.compiler.reset()
    model.compile_networks(backend="aot_eager", fullgraph=True)  # raises where a graph breaks
    assert list(model.state_dict()) == keys
    assert_same_step(model, expected)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model.ae.encoder(x), tiny().ae.encoder(x))


def test_attention_gets_what_fused_kernels_take(monkeypatch):
    strides = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention",
        lambda *tensors: strides.extend(t.stride(-1) for t in tensors) or plain(*tensors),
    )
    for memory_format in (torch.contiguous_format, torch.channels_last):
        tiny().ae.to(memory_format=memory_format)(images())
    assert len(strides) == 2 * 3 * 4 and set(strides) == {1}
