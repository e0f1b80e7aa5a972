"""What the modern recipe adds to the VQGAN: codebook, discriminator, perceptual distance."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import VQGAN
from models.autoencoder.discriminator import BlurPool, Discriminator
from models.autoencoder.perceptual import EfficientNetDistance, lite0_weights
from models.autoencoder.quantizers import NearestQuantizer, draw, entropy_loss, kmeans, nearest
from models.autoencoder.vqgan import hinge_loss

TINY = dict(
    img_size=16, n_channels=3, nf=32, ch_mult=[1, 1], res_blocks=1, attn_resolutions=[8],
    emb_dim=8, codebook_size=20, latent_shape=[1, 8, 8], quantizer="nearest", beta=0.25, ndf=4,
    disc_layers=2, disc_weight_max=1.0, disc_start_step=10, diff_aug=False, perceptual_weight=0.0,
    perceptual_range="0_1",
)


def images(n_channels=3, size=16, batch=2):
    return torch.rand(batch, n_channels, size, size, generator=rng())


def rng():
    return torch.Generator().manual_seed(0)


# The codebook ------------------------------------------------------------------------------


def test_kmeans_finds_clusters_that_lie_apart():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = (centres[:, None] + 0.1 * torch.randn(3, 40, 2, generator=rng())).flatten(0, 1)
    found = kmeans(vectors, 6, rng(), iterations=20)
    means = vectors.view(3, 40, 2).mean(1)
    assert torch.cdist(centres, found).amin(1).max() < 0.3  # none of the three is missed
    three = kmeans(means.repeat(5, 1), 3, rng(), iterations=20)
    assert torch.cdist(means, three).amin(1).max() < 1e-4


def test_kmeans_gives_more_centres_than_there_are_vectors():
    vectors = torch.randn(4, 3, generator=rng())
    found = kmeans(vectors, 9, rng())
    assert found.shape == (9, 3) and torch.cdist(found, vectors).amin(1).max() < 1e-3


def test_draw_takes_each_vector_once_before_any_twice():
    vectors = torch.arange(5.0)[:, None]
    assert sorted(draw(vectors, 5, rng()).flatten().tolist()) == [0, 1, 2, 3, 4]
    counts = torch.bincount(draw(vectors, 12, rng()).flatten().long(), minlength=5)
    assert counts.min() >= 2 and counts.max() <= 3


def test_a_bypassed_quantizer_passes_vectors_and_has_no_loss():
    quantizer = NearestQuantizer(5, 3, 0.25)
    quantizer.bypass = True
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    z_q, loss, _, ids = quantizer(z)
    assert torch.equal(z_q, z) and loss == 0 and ids.shape == (2, 16)
    (gradient,) = torch.autograd.grad(z_q.sum() + loss, z)
    assert torch.equal(gradient, torch.ones_like(z))


def test_revival_replaces_the_unused_entries_alone_by_vectors_of_the_batch():
    quantizer = NearestQuantizer(6, 2, 0.25, count_uses=True)
    nn.init.normal_(quantizer.codebook, generator=rng())
    quantizer.codebook.data[4:] += 100  # far from all vectors
    z = torch.randn(2, 2, 8, 8, generator=rng())
    quantizer.eval()(z)
    assert quantizer.uses.sum() == 0  # evaluation does not count
    _, _, stats, ids = quantizer.train()(z)
    assert torch.equal(quantizer.uses, stats["usage"])
    before = quantizer.codebook.detach().clone()
    dead = quantizer.revive(rng())
    assert dead.tolist() == [not (ids == i).any() for i in range(6)] and dead[4:].all()
    assert torch.equal(quantizer.codebook[~dead], before[~dead])
    vectors = z.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.cdist(quantizer.codebook[dead], vectors).amin(1).max() < 1e-3
    assert quantizer.uses.sum() == 0 and not torch.equal(quantizer.codebook[4:], before[4:])


def test_uses_are_in_the_state_dict_only_where_they_are_counted():
    assert set(NearestQuantizer(4, 2, 0.25).state_dict()) == {"embedding.weight"}
    assert set(NearestQuantizer(4, 2, 0.25, count_uses=True).state_dict()) == {
        "embedding.weight", "uses"
    }


def test_entropy_is_low_where_ids_are_certain_and_alike():
    codebook = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    even, one = codebook[None], codebook[:1].expand(1, 4, 2)
    between = codebook.mean(0).expand(1, 4, 2)
    assert float(entropy_loss(even, codebook)) == pytest.approx(-math.log(4), abs=1e-4)
    for vectors in (one, between):  # certain, but one id only; alike, but not certain
        assert float(entropy_loss(vectors, codebook)) == pytest.approx(0, abs=1e-4)
    quantizer = NearestQuantizer(4, 2, 0.25, entropy_weight=0.5)
    quantizer.codebook.data.copy_(codebook)
    z = torch.randn(1, 2, 3, 3)
    plain = NearestQuantizer(4, 2, 0.25)
    plain.codebook.data.copy_(codebook)
    vectors = z.flatten(2).transpose(1, 2)
    expected = plain(z)[1] + 0.5 * entropy_loss(vectors, codebook)
    assert torch.allclose(quantizer(z)[1], expected)
    assert torch.equal(nearest(vectors, codebook), plain(z)[3])


# The discriminator -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "spectral"])
@pytest.mark.parametrize("blur", [False, True])
def test_logits_of_an_image_do_not_depend_on_the_others(norm, blur):
    torch.manual_seed(0)
    disc = Discriminator(3, 8, 2, 32, norm, blur).train()
    if norm == "spectral":
        disc.eval()  # which holds its power iteration still
    x = images(size=32, batch=4)
    assert torch.allclose(disc(x)[:1], disc(x[:1]), atol=1e-6)
    assert disc(x).shape == (4, 1, *([8, 8] if blur else [6, 6]))


def test_spectral_norm_bounds_every_convolution():
    torch.manual_seed(0)
    disc = Discriminator(3, 8, 2, 32, "spectral").train()
    for _ in range(20):
        disc(images(size=32))
    for layer in disc.main:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.05


def test_blur_pool_is_a_low_pass_at_half_the_side():
    x = images(size=8)
    blurred = BlurPool(3)(x)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    assert torch.allclose(
        blurred[0, 1, 2, 3], taps @ padded[0, 1, 4:8, 6:10] @ taps, atol=1e-6
    )
    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    flat = BlurPool(1)(checkerboard.float()[None, None])
    assert torch.allclose(flat, torch.full_like(flat, 0.5))  # nothing of it is aliased
    assert not BlurPool(3).state_dict()


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="batch, group or spectral"):
        Discriminator(3, 8, 2, 32, "layer")


def modern(**changes):
    torch.manual_seed(0)
    return VQGAN(SimpleNamespace(**TINY | dict(norm_groups=8, disc_norm="group") | changes))


def test_the_adversarial_loss_waits_and_is_faded_in():
    model = modern(disc_start_step=10, disc_lead_steps=5, disc_fade_steps=4)
    shares = {step: model.adversarial_share(step) for step in (9, 10, 14, 15, 16, 19, 20, 99)}
    assert shares == {9: 0, 10: 0, 14: 0, 15: 0.2, 16: 0.4, 19: 1, 20: 1, 99: 1}
    weights = {
        step: float(model.generator_losses(images(), step)[2]["d_weight"]) for step in (14, 15, 99)
    }
    assert weights[14] == 0 and weights[15] == pytest.approx(0.2 * weights[99], rel=1e-4)
    fifth = modern(disc_start_step=10, disc_weight=0.2)
    assert float(fifth.generator_losses(images(), 99)[2]["d_weight"]) == pytest.approx(
        0.2 * weights[99], rel=1e-4
    )
    published = modern()
    assert published.adversarial_share(9) == 0 and published.adversarial_share(10) == 1


def test_discriminator_losses_tell_what_it_takes_for_real():
    model = modern()
    real, fake = torch.tensor([1.0, 2.0, -1.0, 0.5]), torch.tensor([-1.0, 3.0, -0.5, 4.0])
    model.discriminate = lambda x: torch.cat((real, fake))
    loss, stats = model.discriminator_losses(images(), images())
    assert stats == {"d_real_right": 0.75, "d_fake_right": 0.5}
    assert loss == pytest.approx(((0 + 0 + 2 + 0.5) / 4 + (0 + 4 + 0.5 + 5) / 4) / 2)


@pytest.mark.parametrize("norm, passes", [("batch", 2), ("group", 1), ("spectral", 1)])
def test_the_discriminator_sees_both_at_once_where_logits_do_not_mix(norm, passes):
    model, calls = modern(disc_norm=norm).eval(), []
    model.disc.register_forward_hook(lambda *_: calls.append(1))
    real, fake = images(), images().flip(3)
    loss, _ = model.discriminator_losses(real, fake)
    assert len(calls) == passes
    torch.testing.assert_close(loss, hinge_loss(model.disc(real), model.disc(fake)))


def of_features(lite0, **changes):
    """A VQGAN for images of 32 pixels whose discriminator looks at the features of `lite0`."""
    sizes = dict(img_size=32, latent_shape=[1, 16, 16], attn_resolutions=[], disc_input="features")
    torch.manual_seed(0)
    settings = TINY | sizes | dict(norm_groups=8, disc_norm="group") | changes
    compares = settings["perceptual_weight"] > 0
    return VQGAN(SimpleNamespace(**settings), lite0 if compares else None, lite0)


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_heads_on_features_give_logits_that_do_not_mix_images(lite0, norm):
    disc = of_features(lite0, disc_norm=norm).disc.eval()
    x = images(size=32, batch=4)
    logits = disc(x)
    assert logits.shape == (4, 6, 16, 16)
    assert torch.allclose(logits[:1], disc(x[:1]), atol=1e-5)
    enlarged = F.interpolate(x, scale_factor=2, mode="bilinear")
    for number, features in enumerate(list(lite0.layers(enlarged))[2:]):
        own = F.avg_pool2d(logits[:, number], 16 // features.shape[2])  # each is repeated
        assert torch.allclose(F.interpolate(own[:, None], 16)[:, 0], logits[:, number], atol=1e-6)
        assert logits[:, number].var() > 0
    grey = of_features(lite0, n_channels=1).disc
    assert grey(images(size=32, n_channels=1)).shape == (2, 6, 16, 16)


@pytest.mark.parametrize("size, sees", [(64, [128, 2]), (128, [128, 4])])
def test_heads_on_features_see_every_second_of_images_that_are_enlarged(
    size, sees, lite0, monkeypatch
):
    grid = [1, size // 2, size // 2]
    model, seen = of_features(lite0, img_size=size, latent_shape=grid), []
    monkeypatch.setattr(lite0, "layers", lambda x: seen.append(x) or type(lite0).layers(lite0, x))
    x, x_hat = images(size=size, batch=4), images(size=size, batch=4).flip(3)
    loss, _ = model.discriminator_losses(x, x_hat)
    (both,) = seen
    assert [both.shape[2], len(both) // 2] == sees
    half = 4 // sees[1]
    expected = hinge_loss(model.disc(x[::half]), model.disc(x_hat[::half]))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    model.generator_losses(x, 99)
    assert len(seen[-1]) == sees[1]


def test_heads_learn_what_the_frozen_network_shows_them(lite0):
    """Hinge loss and gradients: of the heads alone for the one loss, of the image for the other."""
    model = of_features(lite0, perceptual_weight=0.1, perceptual="efficientnet_lite0").train()
    assert not any("network" in key or "perceptual" in key for key in model.state_dict())
    x = images(size=32)
    loss, x_hat, stats = model.generator_losses(x, 99)
    loss.backward()
    assert stats["d_weight"] > 0 and all(p.grad is None for p in model.disc.parameters())
    assert model.ae.generator.blocks[-1].weight.grad.abs().sum() > 0
    optimizer = torch.optim.Adam(model.disc.heads.parameters(), 1e-2)
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, stats = model.discriminator_losses(x, blurred)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 < losses[0] and stats["d_real_right"] > 0.8
    assert all(p.grad is None for p in lite0.parameters())


def test_heads_on_features_refuse_what_they_cannot_see(lite0):
    with pytest.raises(ValueError, match="`disc_input` features needs images of 32 pixels"):
        VQGAN(SimpleNamespace(**TINY | dict(disc_input="features", disc_norm="group")))
    with pytest.raises(ValueError, match="`disc_norm` must be group or spectral"):
        of_features(lite0, disc_norm="batch")


# The perceptual distance -------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    perceptual = EfficientNetDistance()
    state = torch.load(lite0_weights(), map_location="cpu", weights_only=True)
    perceptual.net.load_state_dict(state)
    return perceptual


def test_lite0_distance_is_that_of_the_network_itself(lite0):
    x, y = images(size=64, batch=2), images(size=64, batch=2).flip(-1) * 0.7
    with torch.no_grad():
        layers, logits = lite0.features(x)
        normalised = (x - lite0.mean) / lite0.std
        assert torch.allclose(logits, lite0.net(normalised), atol=1e-4)  # the package's forward
        assert [layer.shape[1:3] for layer in layers] == [
            (32, 32), (16, 32), (24, 16), (40, 8), (80, 4), (112, 4), (192, 2), (320, 2)
        ]
        others, other_logits = lite0.features(y)
        expected = 0.01 * (logits - other_logits).square().mean(1)
        for a, b in zip(layers, others):
            cosine = F.cosine_similarity(a, b, dim=1)  # |u - v|^2 = 2 - 2 cos
            expected += (2 - 2 * cosine).mean((1, 2)) / len(layers)
        assert torch.allclose(lite0(x, y).flatten(), expected, rtol=1e-3)
    assert lite0(x, x).abs().max() < 1e-6


def test_lite0_distance_grows_with_blur_and_gives_gradients_to_images_alone(lite0):
    x = F.interpolate(images(size=8), size=(64, 64), mode="bicubic").clamp(0, 1)
    x = (x + 0.2 * torch.randn(x.shape, generator=rng())).clamp(0, 1)
    distances = []
    for side in (48, 32, 16):
        blurred = F.interpolate(x, size=(side, side), mode="area")
        distances.append(lite0(x, F.interpolate(blurred, size=(64, 64), mode="bilinear")).mean())
    assert distances[0] < distances[1] < distances[2]
    x.requires_grad_()
    lite0.train()(x, x.detach().flip(0)).sum().backward()
    assert x.grad.abs().sum() > 0 and not lite0.training
    assert all(p.grad is None for p in lite0.parameters())


def test_lite0_stays_out_of_checkpoints_and_fits_grey_images(lite0):
    settings = dict(img_size=32, latent_shape=[1, 16, 16], attn_resolutions=[], n_channels=1,
                    perceptual_weight=0.5, perceptual="efficientnet_lite0")
    torch.manual_seed(0)
    model = VQGAN(SimpleNamespace(**TINY | settings), lite0)
    assert not any(key.startswith("perceptual.") for key in model.state_dict())
    x = images(n_channels=1, size=32)
    nll, l1, perceptual = model.reconstruction_losses(x, x.flip(0))
    assert nll == pytest.approx(float(l1 + 0.5 * perceptual)) and perceptual > 0
    with pytest.raises(ValueError, match="efficientnet_lite0 needs images of 32 pixels or more"):
        VQGAN(SimpleNamespace(**TINY | dict(perceptual_weight=1, perceptual="efficientnet_lite0")))
