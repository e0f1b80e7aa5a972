"""Stage 1: the VQGAN against what the published programs compute, and its parts on their own."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import lpips
import pytest
import torch
from scipy.stats import norm
from torch import nn

from models import VQGAN
from models.autoencoder.autoencoder import AttentionBlock
from models.autoencoder.diffaug import brightness, contrast, diff_augment, saturation, translation
from models.autoencoder.discriminator import Discriminator
from models.autoencoder.likelihood import bits_per_dim, gaussian_level_nll, gaussian_nll
from models.autoencoder.perceptual import PerceptualDistance, load_vgg16
from models.autoencoder.quantizers import (
    GumbelQuantizer, NearestQuantizer, codebook_usage, embed_grid, gumbel_temperature,
)
from models.autoencoder.vqgan import adaptive_weight, hinge_loss, weighted_sum

DATA = Path(__file__).parents[2] / "data"

FFHQ = dict(
    img_size=256, n_channels=3, nf=128, ch_mult=[1, 1, 2, 2, 4], res_blocks=2,
    attn_resolutions=[16], emb_dim=256, codebook_size=1024, latent_shape=[1, 16, 16],
    quantizer="nearest", beta=0.25, gumbel_kl_weight=1e-8, gumbel_straight_through=False,
    perceptual_weight=1.0, perceptual_range="0_1", ndf=64, disc_layers=3, disc_weight_max=1,
    disc_start_step=30001, diff_aug=False,
)  # fmt: skip
TINY = FFHQ | dict(
    img_size=16, nf=32, ch_mult=[1, 1], res_blocks=1, attn_resolutions=[8], emb_dim=8,
    codebook_size=20, latent_shape=[1, 8, 8], ndf=4, disc_layers=2, disc_start_step=10,
    perceptual_weight=0.0,
)  # fmt: skip


def tiny(perceptual=None, **changes):
    torch.manual_seed(0)
    return VQGAN(SimpleNamespace(**(TINY | changes)), perceptual)


def images(n_channels=3, size=16, batch=2):
    return torch.rand(batch, n_channels, size, size, generator=torch.Generator().manual_seed(1))


def read_golden(name):
    golden = torch.load(DATA / f"vqgan_{name}.pt", weights_only=True)
    model = VQGAN(SimpleNamespace(**golden["hparams"])).eval()
    model.load_state_dict(golden["state_dict"], strict=True)
    return golden, model


def gaussian_nll_bits(x, mu, logsigma, levels):
    return bits_per_dim(gaussian_nll(x, mu, logsigma), x[0].numel(), levels)


def assert_near(actual, expected, tolerance=1e-5):
    """Equal to `tolerance` times the largest entry of what is expected."""
    assert actual.shape == expected.shape
    worst = (actual - expected).abs().max()
    assert worst <= tolerance * expected.abs().max(), f"off by {worst}"


# Agreement with the published programs -----------------------------------------------------


def test_nearest_autoencoder_agrees_with_golden():
    golden, model = read_golden("nearest")
    with torch.no_grad():
        assert_near(model.ae.encoder(golden["x"]), golden["encoder_out"])
        z_q, loss, stats, indices = model.ae.quantize(golden["encoder_out"])
        assert torch.equal(indices, golden["indices"])
        assert_near(z_q, golden["quantized"])
        assert_near(loss, golden["codebook_loss"])
        assert_near(stats["perplexity"], golden["perplexity"])
        x_hat, loss, _, indices = model.ae(golden["x"])
        assert_near(x_hat, golden["recon"])
        assert_near(loss, golden["codebook_loss"])
        assert torch.equal(indices, golden["indices"])


@pytest.mark.parametrize("name", ["nearest", "gumbel"])
def test_generator_and_discriminator_agree_with_golden(name):
    golden, model = read_golden(name)
    x = golden["x"]
    with torch.no_grad():
        x_hat = model.ae.generator(golden["quantized"])
        assert_near(x_hat, golden["recon"])
        assert_near(model.ae.decode_indices(golden["indices"]), golden["recon"])
        mu, logsigma = model.ae.generator.probabilistic(golden["quantized"])
        assert_near(mu, golden["mu"])
        assert_near(logsigma, golden["logsigma"])
        assert_near(model.disc(x), golden["disc_real"])
        assert_near(model.disc(golden["recon"]), golden["disc_fake"])
        nll, l1, perceptual = model.reconstruction_losses(x, x_hat)
        assert_near(l1, golden["l1"])
        assert perceptual == 0 and nll == l1


def test_gumbel_encoder_and_kl_agree_with_golden():
    golden, model = read_golden("gumbel")
    with torch.no_grad():
        z = model.ae.encoder(golden["x"])
        assert_near(z, golden["encoder_out"])
        # The published programs draw here even in eval mode, but the KL does not depend on it.
        _, loss, _, _ = model.ae.quantize(z)
        assert_near(loss, golden["codebook_loss"])


def test_gaussian_likelihood_agrees_with_golden():
    golden, model = read_golden("nearest")
    with torch.no_grad():
        mu, logsigma = model.ae.generator.probabilistic(golden["quantized"])
    assert_near(gaussian_nll(golden["x"], mu, logsigma), golden["nll_raw"])
    # The golden figure is that of the density, without the width of a level.
    bits = gaussian_nll_bits(golden["x"], mu, logsigma, levels=1).mean()
    assert_near(bits, golden["nll_bits_per_dim"])
    published = gaussian_nll_bits(golden["x"], mu, logsigma, levels=32).mean()
    assert_near(published, golden["nll_bits_per_dim"] + 5)


def test_objectives_and_gradients_agree_with_golden():
    golden, model = read_golden("nearest")
    step = golden["hparams"]["disc_start_step"]
    loss, x_hat, stats = model.generator_losses(golden["x"], step)
    assert_near(stats["l1"], golden["nll"])
    assert_near(stats["g_loss"], golden["g_loss"])
    assert_near(stats["d_weight"], golden["adaptive_weight"])
    assert_near(stats["codebook_loss"], golden["codebook_loss"])
    total = golden["nll"] + golden["adaptive_weight"] * golden["g_loss"] + golden["codebook_loss"]
    assert_near(loss.detach(), total)
    loss.backward()
    assert_near(model.ae.encoder.blocks[0].weight.grad, golden["grad_encoder_first_conv"])
    assert_near(model.ae.generator.blocks[-1].weight.grad, golden["grad_generator_last_conv"])
    assert_near(model.discriminator_losses(golden["x"], x_hat)[0].detach(), golden["d_loss"])


def test_published_settings_give_the_published_shapes():
    with torch.device("meta"):
        model = VQGAN(SimpleNamespace(**FFHQ))
        x = torch.empty(1, 3, 256, 256)
    z = model.ae.encoder(x)
    assert z.shape == (1, 256, 16, 16)
    assert model.ae.generator(z).shape == (1, 3, 256, 256)
    assert model.disc(x).shape == (1, 1, 30, 30)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    expected = {
        "ae.encoder.blocks.0.weight": (128, 3, 3, 3),
        "ae.encoder.blocks.3.conv.weight": (128, 128, 3, 3),
        "ae.encoder.blocks.7.conv1.weight": (256, 128, 3, 3),
        "ae.encoder.blocks.13.conv1.weight": (512, 256, 3, 3),
        "ae.encoder.blocks.14.q.weight": (512, 512, 1, 1),  # the first attention, at side 16
        "ae.encoder.blocks.18.proj_out.bias": (512,),       # the middle's
        "ae.encoder.blocks.21.weight": (256, 512, 3, 3),
        "ae.quantize.embedding.weight": (1024, 256),
        "ae.generator.blocks.0.weight": (512, 256, 3, 3),
        "ae.generator.blocks.5.k.weight": (512, 512, 1, 1),
        "ae.generator.blocks.8.conv.weight": (512, 512, 3, 3),
        "ae.generator.blocks.21.weight": (3, 128, 3, 3),
        "ae.generator.logsigma.0.weight": (128, 128, 3, 3),
        "ae.generator.logsigma.2.weight": (3, 128, 1, 1),
        "disc.main.8.weight": (512, 256, 4, 4),
        "disc.main.11.weight": (1, 512, 4, 4),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert "ae.encoder.blocks.22.weight" not in shapes
    assert "ae.generator.blocks.22.weight" not in shapes


# Layers ------------------------------------------------------------------------------------


def test_attention_block_is_scaled_softmax_over_all_positions():
    torch.manual_seed(0)
    block, x = AttentionBlock(32), torch.randn(2, 32, 3, 4)
    h = block.norm(x)
    q, k, v = (project(h).flatten(2) for project in (block.q, block.k, block.v))  # [B, C, N]
    weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(32)).softmax(2)
    attended = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    torch.testing.assert_close(block(x), x + block.proj_out(attended))


def test_generator_draws_larger_and_oblong_grids():
    model = tiny().eval()
    ids = torch.arange(2 * 6 * 10).view(2, 60) % TINY["codebook_size"]
    assert model.ae.decode_indices(ids, (6, 10)).shape == (2, 3, 12, 20)


def test_one_channel_model():
    model = tiny(n_channels=1, diff_aug=True)
    loss, x_hat, _ = model.generator_losses(images(n_channels=1), step=10)
    assert x_hat.shape == (2, 1, 16, 16)
    loss.backward()
    model.discriminator_losses(images(n_channels=1), x_hat)[0].backward()
    assert model.disc.main[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_bfloat16_autocast_runs_both_ways(quantizer):
    model = tiny(quantizer=quantizer, diff_aug=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, x_hat, stats = model.generator_losses(images(), step=10)
        d_loss, _ = model.discriminator_losses(images(), x_hat)
    assert x_hat.dtype == torch.bfloat16
    assert loss.dtype == d_loss.dtype == stats["codebook_loss"].dtype == torch.float32
    loss.backward()
    d_loss.backward()
    for parameter in (model.ae.encoder.blocks[0].weight, model.disc.main[0].weight):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


# Quantizers --------------------------------------------------------------------------------


def test_nearest_takes_the_closest_vector_and_splits_the_gradient():
    torch.manual_seed(0)
    quantizer = NearestQuantizer(codebook_size=7, emb_dim=3, beta=0.25)
    assert quantizer.embedding.weight.abs().max() <= 1 / 7
    nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    z_q, loss, _, indices = quantizer(z)

    codebook = quantizer.embedding.weight.detach()
    offsets = z.detach().permute(0, 2, 3, 1)[..., None, :] - codebook  # [B, h, w, K, D]
    assert torch.equal(indices.view(2, 4, 5), offsets.square().sum(-1).argmin(-1))
    assert torch.equal(z_q.detach(), embed_grid(codebook, indices, (4, 5)))
    assert torch.equal(z_q[1, :, 2, 3].detach(), codebook[indices[1, 2 * 5 + 3]])

    weights = torch.randn_like(z_q)
    (straight,) = torch.autograd.grad((z_q * weights).sum(), z, retain_graph=True)
    assert torch.equal(straight, weights)  # the identity, whichever id was chosen
    difference = (z - z_q).detach()
    to_z, to_codebook = torch.autograd.grad(loss, (z, quantizer.embedding.weight))
    torch.testing.assert_close(to_z, 2 * difference / z.numel())
    pull = torch.zeros_like(codebook).index_add_(
        0, indices.flatten(), difference.permute(0, 2, 3, 1).reshape(-1, 3)
    )
    torch.testing.assert_close(to_codebook, -0.25 * 2 * pull / z.numel())


def test_nearest_measures_in_float32_under_autocast():
    quantizer = NearestQuantizer(codebook_size=2, emb_dim=4, beta=0.25)
    # bfloat16 rounds both vectors to 1.
    quantizer.embedding.weight.data = torch.tensor([[1.0], [1.001]]).expand(2, 4).clone()
    z = torch.full((1, 4, 1, 1), 1.0009)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, _, _, indices = quantizer(z)
    assert indices.item() == 1 and z_q.dtype == torch.float32


def test_usage_and_perplexity():
    stats = codebook_usage(torch.tensor([[0, 0, 3], [3, 0, 0]]), codebook_size=5)
    assert stats["usage"].tolist() == [4, 0, 0, 2, 0]
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(stats["perplexity"].item(), math.exp(entropy))


@pytest.mark.parametrize("straight_through", [False, True])
def test_gumbel_draws_in_training_and_takes_the_likeliest_in_eval(straight_through):
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(6, 4, kl_weight=1.0, straight_through=straight_through)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    first, second = quantizer(z), quantizer(z)
    assert not torch.equal(first[0], second[0])
    hard = embed_grid(quantizer.codebook, first[3], (3, 5))
    assert torch.allclose(first[0], hard, atol=1e-6) == straight_through
    (gradient,) = torch.autograd.grad(first[0].square().sum(), z)
    assert gradient.abs().sum() > 0

    # A cold draw without one-hot forward is one-hot all the same, so temperature is in use.
    quantizer.temperature = 1e-4
    z_q, _, _, indices = quantizer(z)
    share_hard = (z_q - embed_grid(quantizer.codebook, indices, (3, 5))).abs().amax(1) < 1e-3
    assert share_hard.float().mean() > 0.9

    z_q, _, _, indices = quantizer.eval()(z)
    assert torch.equal(indices, quantizer.proj(z).argmax(1).flatten(1))
    assert torch.equal(z_q, embed_grid(quantizer.codebook, indices, (3, 5)))


def test_gumbel_draws_follow_the_logits():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(3, 1, kl_weight=1.0, straight_through=True)
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    nn.init.zeros_(quantizer.proj.weight)
    quantizer.proj.bias.data = probabilities.log()
    _, kl, stats, _ = quantizer(torch.zeros(1, 1, 100, 100))
    torch.testing.assert_close(stats["usage"] / 1e4, probabilities, atol=0.02, rtol=0)
    torch.testing.assert_close(kl, (probabilities * (probabilities * 3).log()).sum())


def test_gumbel_temperature_schedule():
    assert gumbel_temperature(0) == 1
    assert gumbel_temperature(80_000) == 0.5
    assert gumbel_temperature(150_000) == gumbel_temperature(10**7) == 1 / 16


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_codebook_is_the_table_that_ids_are_looked_up_in(quantizer):
    ae = tiny(quantizer=quantizer).ae
    assert ae.codebook.shape == (20, 8) and not ae.codebook.requires_grad
    ids = torch.arange(64)[None] % 20
    vectors = embed_grid(ae.quantize.codebook, ids, (8, 8))  # [1, D, 8, 8]
    assert torch.equal(vectors[0].flatten(1).T, ae.codebook[ids[0]])
    before = ae.codebook
    before[3] = 7  # no copy: a change shows in the autoencoder
    assert (embed_grid(ae.quantize.codebook, ids, (8, 8))[0, :, 0, 3] == 7).all()


# Losses ------------------------------------------------------------------------------------


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    ratio = a.norm() / (b.norm() + 1e-4)
    torch.testing.assert_close(adaptive_weight(a, b, max_weight=1e4), ratio)
    assert adaptive_weight(a, b, max_weight=ratio.item() / 2) == ratio / 2
    # A gradient of nothing is kept in check by the 1e-4.
    torch.testing.assert_close(adaptive_weight(a, 0 * b, max_weight=1e9), a.norm() / 1e-4)


def plain_objective(model, x, step):
    """The generator's loss with the graph of both losses in it, and the weight that it takes."""
    x_hat, codebook_loss, _, _ = model.ae(x)
    nll = model.reconstruction_losses(x, x_hat)[0]
    g_loss = -model.discriminate(x_hat, frozen=True).mean()
    last, norms = model.ae.generator.blocks[-1].weight, []
    for loss in (nll, g_loss):
        norms.append(torch.autograd.grad(loss, last, retain_graph=True)[0].norm())
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, model.disc_weight_max)
    weight = weight * model.disc_weight * model.adversarial_share(step)
    return nll + weight * g_loss + codebook_loss, weight


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, torch.tensor(1024.0)])
@pytest.mark.parametrize("changes", [
    {}, dict(disc_norm="group", disc_weight=0.3, disc_fade_steps=5), dict(diff_aug=True),
])
def test_the_cut_graph_has_the_gradients_of_the_plain_objective(perceptual, changes, grad_scale):
    found = []
    for scale in (1.0, grad_scale):
        model = tiny(perceptual, perceptual_weight=0.7, disc_weight_max=1e4, **changes).double()
        torch.manual_seed(5)
        if not found:
            loss, weight = plain_objective(model, images().double(), step=10)
        else:
            loss, _, stats = model.generator_losses(images().double(), 10, scale)
            weight = stats["d_weight"]
        (3 * loss * scale).backward()  # as a gradient scaler and a mean over processes do
        gradients = [p.grad.flatten() for p in model.ae.parameters() if p.grad is not None]
        found.append((loss.detach(), weight, torch.cat(gradients) / scale))
    perceptual.float()
    for expected, actual in zip(*found):
        assert_near(actual, expected, 1e-6)
    assert 0 < found[0][1] < 1e4


def test_each_network_is_passed_backward_once(perceptual):
    model, passes = tiny(perceptual, perceptual_weight=1.0), []
    handles = [
        network.register_forward_hook(
            lambda module, _, output: output.register_hook(lambda _: passes.append(module)) and None
        ) for network in (perceptual, model.disc)
    ]
    loss, _, _ = model.generator_losses(images(), step=10)
    loss.backward()
    for handle in handles:
        handle.remove()
    assert passes == [perceptual, model.disc]


def test_grad_scale_keeps_float16_gradients_from_vanishing():
    x_hat, last = torch.ones(4, dtype=torch.float16), torch.ones(4, requires_grad=True)

    def weighted(scale):
        image = x_hat * last.half()
        seen = image.detach().requires_grad_()
        faint = (seen * 1e-4).sum().float() * 1e-5  # gradients of 1e-9, zero in float16
        loss, weight = weighted_sum(faint, seen.float().sum(), 1.0, 1.0, image, seen, last, scale)
        last.grad = None
        (loss * scale).backward()
        return weight, last.grad / scale

    assert weighted(1.0)[0] == 0
    weight, gradient = weighted(2.0**13)
    torch.testing.assert_close(weight.item(), 2e-9 / (2 + 1e-4), rtol=0.01, atol=0)
    torch.testing.assert_close(gradient, torch.full((4,), 2e-9), rtol=0.01, atol=0)
    # What float16 cannot hold is left out, and the step goes on with the other loss.
    image = x_hat * last.half()
    seen = image.detach().requires_grad_()
    nll, g_loss = seen.float().sum(), seen.float().sum() * 1e6
    loss, weight = weighted_sum(nll, g_loss, 1.0, 1.0, image, seen, last)
    last.grad = None
    loss.backward()
    assert weight == 0 and torch.equal(last.grad, torch.ones(4))
    # Where both are too large the loss is what it is, and its gradient tells.
    image = x_hat * last.half()
    seen = image.detach().requires_grad_()
    nll, g_loss = seen.float().sum(), 3 * seen.float().sum()
    loss, weight = weighted_sum(nll, g_loss, 1.0, 1.0, image, seen, last, 2.0**20)
    last.grad = None
    loss.backward()
    assert weight == 0 and loss == 4 and not last.grad.isfinite().any()


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake) == ((0 + 0.5) / 2 + (0 + 2) / 2) / 2


def test_gaussian_nll_is_that_of_torch_and_bits_count_levels():
    torch.manual_seed(0)
    x, mu, logsigma = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    normal = torch.distributions.Normal(mu, logsigma.exp())
    nats = -normal.log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_nll(x, mu, logsigma), nats)
    bits = (nats + 60 * math.log(256)) / (60 * math.log(2))
    torch.testing.assert_close(gaussian_nll_bits(x, mu, logsigma, levels=256), bits)
    # A uniform density on [0, 1] costs exactly the bits of a level.
    assert bits_per_dim(torch.tensor(0.0), n_dims=60, levels=32) == 5


def test_gaussian_levels_add_up_and_agree_with_the_density():
    levels = 8
    x = (torch.arange(levels) / (levels - 1)).view(levels, 1, 1, 1)
    for mu, logsigma in ((0.3, -2.0), (1.4, -3.0), (0.0, -8.0), (-20.0, 0.0)):
        nats = gaussian_level_nll(x, torch.tensor(mu), torch.tensor(logsigma), levels)
        assert nats.min() >= 0 and nats.dtype == torch.float64
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-9)
    # Where a level is narrow, its probability is the density in its middle times its width.
    torch.manual_seed(0)
    x = torch.randint(1, 255, (2, 3, 4, 5)) / 255
    mu, logsigma = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5) - 1
    density = gaussian_nll(x.double(), mu.double(), logsigma.double()) + 60 * math.log(255)
    torch.testing.assert_close(gaussian_level_nll(x, mu, logsigma), density, rtol=1e-5, atol=0)
    # Far from the mean the logarithm is still exact.
    far = gaussian_level_nll(torch.ones(1, 1), torch.tensor(0.5), torch.tensor(-5.0), levels)
    edge = (1 - 0.5 / 7 - 0.5) * math.exp(5)
    assert float(far) == pytest.approx(-norm.logsf(edge), rel=1e-6)


def test_discriminator_is_unused_before_disc_start_step():
    model = tiny()
    calls = []
    model.disc.register_forward_hook(lambda *_: calls.append(1))
    loss, _, stats = model.generator_losses(images(), step=9)
    assert stats["d_weight"] == stats["g_loss"] == 0 and not calls
    torch.testing.assert_close(loss.detach(), stats["l1"] + stats["codebook_loss"])
    loss, _, stats = model.generator_losses(images(), step=10)
    assert stats["d_weight"] > 0 and stats["g_loss"] != 0 and calls
    for value in stats.values():
        assert value.shape == () and not value.requires_grad


def test_each_objective_moves_only_its_own_side():
    model = tiny(disc_weight_max=1e4)
    loss, x_hat, stats = model.generator_losses(images(), step=10)
    last = model.ae.generator.blocks[-1].weight
    (total,) = torch.autograd.grad(loss, last, retain_graph=True)
    (from_l1,) = torch.autograd.grad((images() - x_hat).abs().mean(), last, retain_graph=True)
    adversarial = (total - from_l1) / stats["d_weight"]  # reaches the generator through D
    torch.testing.assert_close(
        stats["d_weight"], from_l1.norm() / (adversarial.norm() + 1e-4), rtol=1e-4, atol=0
    )
    assert 0.1 < stats["d_weight"] < 0.9  # neither clamped nor lost in the 1e-4
    loss.backward()
    assert all(p.grad is None for p in model.disc.parameters())
    assert all(p.requires_grad for p in model.disc.parameters())

    model.ae.zero_grad()
    model.discriminator_losses(images(), x_hat)[0].backward()
    assert all(p.grad is None for p in model.ae.parameters())
    assert all(p.grad is not None for p in model.disc.parameters())


def test_discriminator_sees_augmented_images():
    shown = []
    model = tiny(diff_aug=True)
    model.disc.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0]))
    _, x_hat, _ = model.generator_losses(images(), step=10)
    model.discriminator_losses(images(), x_hat)
    assert len(shown) == 3
    for seen, plain in zip(shown, (x_hat, images(), x_hat)):
        assert seen.shape == plain.shape and not torch.equal(seen, plain)


# Discriminator -----------------------------------------------------------------------------


@pytest.mark.parametrize("size, disc_layers", [(8, 1), (12, 2), (31, 3)])
def test_discriminator_sides(size, disc_layers):
    side = size // 2**disc_layers - 2
    disc = Discriminator(3, 4, disc_layers, size)
    assert disc(images(size=size)).shape == (2, 1, side, side)


def test_discriminator_initialisation_and_widths():
    torch.manual_seed(0)
    disc = Discriminator(3, 16, 5, 128)
    widths = [m.out_channels for m in disc.main if isinstance(m, nn.Conv2d)]
    assert widths == [16, 32, 64, 128, 128, 128, 1]
    weights = torch.cat([m.weight.flatten() for m in disc.main if isinstance(m, nn.Conv2d)])
    torch.testing.assert_close(weights.std().item(), 0.02, rtol=0.02, atol=0)
    scales = torch.cat([m.weight for m in disc.main if isinstance(m, nn.BatchNorm2d)])
    assert abs(scales.mean() - 1) < 0.01 and 0.015 < scales.std() < 0.025


# DiffAug -----------------------------------------------------------------------------------


def test_diff_augment_repeats_with_its_rng_and_passes_gradients():
    x = images().requires_grad_()

    def run(seed):
        return diff_augment(x, rng=torch.Generator().manual_seed(seed))

    rng = torch.Generator().manual_seed(3)
    in_order = translation(contrast(saturation(brightness(x, rng), rng), rng), rng)
    assert torch.equal(run(3), run(3)) and torch.equal(run(3), in_order)
    assert not torch.equal(run(3), run(4))
    (gradient,) = torch.autograd.grad(run(3).sum(), x)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.5
    state = torch.random.get_rng_state()
    run(3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_brightness_only_shifts_each_image_by_its_own_constant():
    x = images(batch=200)
    shift = (brightness(x) - x).flatten(1)
    assert shift.std(1).max() < 1e-6
    means = shift.mean(1)
    assert means.min() < -0.4 and means.max() > 0.4 and means.abs().max() <= 0.5


def test_saturation_keeps_grey_and_contrast_keeps_the_mean():
    x = images(batch=200)
    y = saturation(x)
    torch.testing.assert_close(y.mean(1), x.mean(1))
    factor = ((y - y.mean(1, True)) / (x - x.mean(1, True)))[:, 0, 0, 0]
    assert factor.min() < 0.2 and factor.max() > 1.8 and factor.max() <= 2
    z = contrast(x)
    torch.testing.assert_close(z.mean((1, 2, 3)), x.mean((1, 2, 3)))
    factor = z.flatten(1).std(1) / x.flatten(1).std(1)
    mean = x.mean((1, 2, 3), keepdim=True)  # of all channels: colours fade too
    torch.testing.assert_close(z, mean + (x - mean) * factor.view(-1, 1, 1, 1))
    assert 0.499 < factor.min() < 0.6 and 1.4 < factor.max() < 1.501
    grey = images(n_channels=1)
    assert torch.equal(saturation(grey), grey)


def test_translation_moves_whole_pixels_and_fills_with_zeros():
    x = 1 + torch.rand(300, 2, 16, 24)
    moved = translation(x, torch.Generator().manual_seed(0))
    shifts = set()
    for before, after in zip(x, moved):
        filled = after[0] != 0  # the image itself has no zeros
        rows, columns = filled.any(1).nonzero(), filled.any(0).nonzero()
        dy = int(rows[0]) or int(rows[-1]) - 15
        dx = int(columns[0]) or int(columns[-1]) - 23
        expected = torch.zeros_like(before)
        expected[:, max(dy, 0):16 + min(dy, 0), max(dx, 0):24 + min(dx, 0)] = before[
            :, max(-dy, 0):16 + min(-dy, 0), max(-dx, 0):24 + min(-dx, 0)
        ]
        assert torch.equal(after, expected)
        shifts.add((dy, dx))
    # An eighth of each side, both ways, all of them.
    assert shifts == {(dy, dx) for dy in range(-2, 3) for dx in range(-3, 4)}


# LPIPS -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptual():
    torch.manual_seed(0)
    return PerceptualDistance()


def test_perceptual_keys_are_the_published_ones(perceptual):
    golden, model = read_golden("nearest")
    published = SimpleNamespace(**golden["hparams"], perceptual_range="0_1")
    keys = set(VQGAN(published, perceptual).state_dict())
    assert keys == set(golden["state_dict"]) | set(golden["perceptual_keys"])
    assert set(model.state_dict()) == set(golden["state_dict"])
    published.perceptual_weight = 0.0
    assert set(VQGAN(published, perceptual).state_dict()) == set(golden["state_dict"])


def test_perceptual_heads_are_those_of_the_lpips_package(perceptual):
    shipped = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth",
        map_location="cpu",
        weights_only=True,
    )
    state = perceptual.state_dict()
    assert len(shipped) == 5
    for name, weight in shipped.items():
        assert torch.equal(state[name], weight), name
        assert torch.equal(state[name.replace("lin", "lins.")], weight), name
    shift, scale = (state[f"scaling_layer.{name}"].flatten() for name in ("shift", "scale"))
    torch.testing.assert_close(shift, torch.tensor([-0.03, -0.088, -0.188]))
    torch.testing.assert_close(scale, torch.tensor([0.458, 0.448, 0.45]))
    assert all(weight.isfinite().all() for weight in state.values())


def test_perceptual_is_what_lpips_computes(perceptual):
    x, y = images().requires_grad_(), images().flip(3)
    y[:, :, :, :4] = x.detach()[:, :, :, :4]  # differences of zero too
    expected, actual = lpips.LPIPS.forward(perceptual, x, y), perceptual(x, y)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (expected, actual)]
    assert_near(gradients[1], gradients[0])
    dark = torch.zeros(1, 3, 16, 16)
    assert perceptual(dark, dark) == 0


def test_perceptual_stays_frozen_and_eval(perceptual):
    model = tiny(perceptual, perceptual_weight=1.0).train()
    assert model.disc.training
    assert not any(module.training for module in model.perceptual.modules())
    loss, x_hat, stats = model.generator_losses(images(), step=0)
    assert stats["perceptual"] > 0
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())
    assert model.ae.generator.blocks[-1].weight.grad.abs().sum() > 0


def test_perceptual_weight_and_range(perceptual):
    x, x_hat = images(), images().flip(3).requires_grad_()
    l1 = (x - x_hat).abs().mean()
    for value_range, at in (("0_1", lambda v: v), ("-1_1", lambda v: 2 * v - 1)):
        model = tiny(perceptual, perceptual_weight=0.5, perceptual_range=value_range)
        nll, _, distance = model.reconstruction_losses(x, x_hat)
        torch.testing.assert_close(distance, perceptual(at(x), at(x_hat)).mean())
        torch.testing.assert_close(nll, l1 + 0.5 * distance)
    assert abs(perceptual(x, x_hat) / perceptual(2 * x - 1, 2 * x_hat - 1) - 1).max() > 0.01


def test_perceptual_repeats_one_channel(perceptual):
    model = tiny(perceptual, n_channels=1, perceptual_weight=1.0)
    x, x_hat = images(n_channels=1), images(n_channels=1).flip(2)
    torch.testing.assert_close(
        model.perceptual_loss(x, x_hat),
        perceptual(x.repeat(1, 3, 1, 1), x_hat.repeat(1, 3, 1, 1)).mean(),
    )


def test_vgg16_weights_fill_the_trunk(perceptual):
    trunk = nn.Sequential()  # torchvision's `features` up to relu5_3
    widths = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
    channels = 3
    for width in widths:
        if width == "M":
            trunk.append(nn.MaxPool2d(2))
        else:
            trunk.extend([nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()])
            channels = width
    state = {f"features.{name}": weight for name, weight in trunk.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(1)

    for key in ("features.0.bias", "features.28.weight"):
        incomplete = {name: weight for name, weight in state.items() if name != key}
        with pytest.raises(ValueError, match=key):
            load_vgg16(perceptual, incomplete)
    with pytest.raises(ValueError, match=r"features\.5\.weight.*\[1, 2\]"):
        load_vgg16(perceptual, state | {"features.5.weight": torch.zeros(1, 2)})

    load_vgg16(perceptual, state)
    x = images()
    with torch.no_grad():
        deepest = perceptual.net(x).relu5_3
        torch.testing.assert_close(deepest, trunk(x))
    assert not any(p.requires_grad for p in perceptual.parameters())


# Settings that cannot work -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(nf=48), "`nf` 48 x `ch_mult` 1 = 48 is no multiple of `norm_groups` 32"),
        (dict(nf=16, ch_mult=[2, 4]),
         "`nf` 16 x `ch_mult` 1 = 16 is no multiple of `norm_groups` 32"),
        (dict(img_size=17), "`img_size` 17 cannot be halved 1 times, as the 2 levels of `ch_mult`"),
        (dict(latent_shape=[1, 16, 16]), "`latent_shape` 1 16 16 does not follow from `img_size` "
         "16 and `ch_mult` 1 1, which give 1 8 8"),
        (dict(attn_resolutions=[8, 7]), "`attn_resolutions` 7 never occurs: the sides are 16 8"),
        (dict(quantizer="lookup"), "`quantizer` must be nearest or gumbel, not 'lookup'"),
        (dict(disc_layers=3), "`disc_layers` 3 leaves nothing of images of 16 pixels"),
        (dict(disc_layers=0), "`disc_layers` must be at least 1, not 0"),
        (dict(img_size=8, latent_shape=[1, 4, 4], disc_layers=1, perceptual_weight=0.1),
         "`perceptual` lpips needs images of 16 pixels or more, not `img_size` 8: set "
         "`perceptual_weight` 0"),
    ],
)
def test_invalid_settings_raise(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)), torch.device("meta"):
        tiny(**changes)


def test_invalid_perceptual_settings_raise():
    def distance(x, y):
        raise AssertionError("never reached")

    module = nn.Module()
    module.forward = distance
    small = dict(img_size=8, latent_shape=[1, 4, 4], disc_layers=1, perceptual_weight=1.0)
    with pytest.raises(ValueError, match="`perceptual_weight` 0"):
        tiny(module, **small)
    with pytest.raises(ValueError, match="`perceptual_range` must be"):
        tiny(module, perceptual_weight=1.0, perceptual_range="0_255")
    assert tiny(module, **(small | dict(perceptual_weight=0.0))).perceptual is None


def test_ids_that_do_not_fill_the_grid_raise():
    model = tiny()
    with pytest.raises(ValueError, match="8x8 grid must be"):
        model.ae.decode_indices(torch.zeros(2, 60, dtype=torch.long))
