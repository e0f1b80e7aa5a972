"""Everything runs on tensors that claim to lie on a GPU, without a mix of devices."""

from types import SimpleNamespace

import pytest
import torch
from claimed_device import Claimed, claimed_devices
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import TinyExtractor
from models import SAMPLERS, VQGAN, AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.autoencoder.diffaug import diff_augment
from models.autoencoder.formats import in_precision, to_fast_format
from models.autoencoder.likelihood import gaussian_level_nll, gaussian_nll
from models.autoencoder.perceptual import EfficientNetDistance, PerceptualDistance
from models.autoencoder.quantizers import NearestQuantizer
from models.sampling.canvas import WindowedDenoiser, decode_canvas
from models.sampling.samplers import truncate
from utils.evaluation import features
from utils.evaluation.metrics import FeatureStatistics, frechet_distance_of_features, prdc, psnr
from utils.evaluation.neighbours import NearestNeighbours
from utils.evaluation.reconstruction import ReconstructionDistance

AUTOENCODER = dict(
    img_size=32, n_channels=3, nf=32, ch_mult=[1, 1, 1], res_blocks=1, attn_resolutions=[8],
    emb_dim=8, codebook_size=12, latent_shape=[1, 8, 8], quantizer="nearest", beta=0.25,
    gumbel_kl_weight=1e-8, gumbel_straight_through=False, perceptual_weight=1.0,
    perceptual_range="0_1", ndf=8, disc_layers=2, disc_weight_max=1, disc_start_step=10,
    diff_aug=True,
)
SAMPLER = dict(
    sampler="absorbing", attention="hydra", position=["rpb", "absolute"], latent_shape=[1, 8, 8],
    block_size=64, bert_n_emb=32, bert_n_head=4, bert_n_layers=2, kernel_sizes=[3, 7],
    dilations=[1], codebook_size=12, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    total_steps=8, loss_type="reweighted_elbo", mask_schedule="random", t_sampling="uniform",
    sample_type="diffusion", sample_steps=4, choice_temp=4.5, remask=0.05, top_k=5, top_p=0.9,
)


@pytest.fixture
def gpu():
    """The claimed device, in a context in which mixing it with the CPU fails."""
    torch.manual_seed(0)
    with claimed_devices():
        yield torch.device("cuda")


def on_gpu(*values):
    """Whether all are tensors of the claimed device, with finite numbers."""
    return all(isinstance(v, Claimed) and bool(v.isfinite().all()) for v in values)


def vqgan(gpu, **changes):
    name = changes.get("perceptual", "lpips")
    distance = PerceptualDistance() if name == "lpips" else EfficientNetDistance()
    return VQGAN(SimpleNamespace(**AUTOENCODER | changes), distance).to(gpu)


def prior(gpu, **changes):
    H = SimpleNamespace(**SAMPLER | changes)
    codebook = torch.randn(H.codebook_size, 8)
    if H.sampler == "autoregressive":
        return AutoregressiveTransformer(H, codebook).to(gpu)
    return AbsorbingDiffusion(H, Transformer(H), H.codebook_size, codebook).to(gpu)


def ids_on(gpu, batch=2):
    return torch.randint(12, (batch, 64), device=gpu)


# What it finds -----------------------------------------------------------------------------


def test_mixed_devices_are_found(gpu):
    x = torch.randn(3, 4, device=gpu)
    assert x.device.type == "cuda" and on_gpu(x + torch.tensor(2.0))
    assert torch.equal(x.cpu(), x.inner) and not isinstance(x.cpu(), Claimed)
    for mix in (
        lambda: x + torch.ones(4), lambda: x[torch.tensor([0, 1])],
        lambda: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0),
        lambda: torch.cat((x, torch.ones(1, 4))),
    ):
        with pytest.raises(AssertionError, match="mixes devices"):
            mix()
    with pytest.raises(AssertionError, match="generator"):
        torch.rand(3, device=gpu, generator=torch.Generator())


def test_networks_run_on_fake_tensors_of_a_gpu():
    """As above without any values, in torch's own mode."""
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.rand(2, 3, 32, 32)
        model = VQGAN(SimpleNamespace(**AUTOENCODER | dict(perceptual_weight=0.0)))
        x_hat, loss, _, ids = model.ae(images)
        losses = model.reconstruction_losses(images, x_hat)
        d_loss, _ = model.discriminator_losses(images, x_hat)
        H = SimpleNamespace(**SAMPLER | dict(position=["rope"]))  # a bias is drawn by values
        logits = Transformer(H)(ids)
        assert logits.shape == (2, 64, 12)
        for tensor in (x_hat, loss, *losses, d_loss, logits):
            assert tensor.device.type == "cuda"


# Stage one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, dict(quantizer="gumbel", disc_norm="group"),
    dict(perceptual="efficientnet_lite0", disc_norm="spectral", disc_blur=True, norm_groups=8),
])
def test_autoencoder_and_losses(gpu, changes, monkeypatch):
    model = to_fast_format(vqgan(gpu, **changes), gpu).train()
    images = torch.rand(2, 3, 32, 32, device=gpu)
    # A backward pass asks for the driver of the card.
    monkeypatch.setattr(
        torch.autograd, "grad", lambda _, inputs, *__, **___: (torch.rand_like(inputs),)
    )
    for step in (0, 10):
        for scale in (1.0, torch.tensor(2.0, device=gpu)):
            loss, x_hat, stats = model.generator_losses(images, step, scale)
            d_loss, d_stats = model.discriminator_losses(images, x_hat)
            assert on_gpu(loss, x_hat, d_loss, *stats.values(), *d_stats.values())
    model.eval()
    with torch.no_grad():
        for ae in (model.ae, in_precision(model.ae, torch.bfloat16)):
            _, _, _, ids = ae.encode(images)
            assert on_gpu(ids, ae.decode_indices(ids))
        mu, logsigma = model.ae.generator.probabilistic(torch.randn(2, 8, 8, 8, device=gpu))
        assert on_gpu(gaussian_nll(images, mu, logsigma), gaussian_level_nll(images, mu, logsigma))


def test_codebook(gpu):
    quantizer = NearestQuantizer(12, 8, 0.25, entropy_weight=0.1, count_uses=True).to(gpu)
    quantizer.train().initialize(torch.randn(40, 8, device=gpu), torch.Generator())
    for quantizer.bypass in (False, True):
        z_q, loss, usage, ids = quantizer(torch.randn(2, 8, 3, 4, device=gpu))
        assert on_gpu(z_q, loss, ids, *usage.values())
    assert on_gpu(quantizer.revive(torch.Generator()), quantizer.codebook)


def test_differentiable_augmentation(gpu):
    assert on_gpu(diff_augment(torch.rand(2, 3, 16, 16, device=gpu)))


# Stage two ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, dict(position=["rope"], t_sampling="low_discrepancy"), dict(position=["rope", "absolute"]),
    dict(position=["absolute"], mask_schedule="fixed", loss_type="mlm", dilations=[1, 2],
         kernel_sizes=[3, 3]),
    dict(attention="full", position=["absolute"], loss_type="elbo"),
])
def test_diffusion(gpu, changes):
    model = prior(gpu, **changes)
    ids = ids_on(gpu, 4)
    for part in ((0, 1), (1, 2)):
        assert on_gpu(*model.train()(ids, part=part).values())
    assert on_gpu(*model.eval()(ids).values(), model.bits_per_token(ids))
    assert on_gpu(model.nats(ids), model.nats(ids, draws=2), model.embed(ids))
    assert on_gpu(model.loss_history, model.Lt_history, model.Lt_count)


@pytest.mark.parametrize("method", SAMPLERS)
def test_sampling_methods(gpu, method):
    model = prior(gpu, position=["rope"]).eval()
    known = ids_on(gpu)
    known[:, ::3] = model.mask_id
    for start in (None, known):
        ids = model.sample(2, sample_type=method, known=start, progress=lambda *at: None)
        assert on_gpu(ids) and int(ids.max()) < 12


def test_canvases(gpu):
    model = prior(gpu).eval()

    def denoise(ids, where):
        return model._denoise_fn(ids, where=where)

    windows = WindowedDenoiser(denoise, (8, 8), (12, 10), batch_size=2)
    ids = model.sample(1, grid=(12, 10), denoise=windows, sample_steps=2)
    assert on_gpu(ids) and ids.shape == (1, 120)
    ae = vqgan(gpu).eval().ae
    with torch.no_grad():
        canvas = decode_canvas(ae.generator, model.embed(ids, (12, 10)), (8, 8))
    assert canvas.shape == (1, 3, 48, 40) and canvas.device.type == "cpu"


def test_autoregressive(gpu):
    model = prior(gpu, sampler="autoregressive", attention="full", position=["absolute"])
    ids = ids_on(gpu)
    assert on_gpu(*model(ids).values(), model.bits_per_token(ids), model.nats(ids))
    assert on_gpu(model.eval().sample(2))
    logits = truncate(torch.randn(3, 12, device=gpu), top_k=4, top_p=0.8)
    assert not isinstance(logits.cpu(), Claimed)


# Measures ----------------------------------------------------------------------------------


def test_measures_of_features(gpu):
    a, b = torch.rand(20, 6, device=gpu), torch.rand(24, 6, device=gpu)
    statistics = FeatureStatistics()
    statistics.update(a)
    assert len(statistics.finish()[0]) == 6
    assert frechet_distance_of_features(a, b) > 0
    assert frechet_distance_of_features(a[:, :6], a.repeat(1, 9)[:, :6]) < 1e-6
    assert set(prdc(a, b, 3, block=8)) == {"precision", "recall", "density", "coverage"}
    nearest = NearestNeighbours(a, 2)
    nearest.add(b, torch.arange(24))
    assert on_gpu(nearest.distances, nearest.indices)
    images = torch.rand(2, 3, 8, 8, device=gpu)
    assert on_gpu(psnr(images, images.flip(3)), PerceptualDistance().to(gpu).vectors(
        torch.rand(2, 3, 16, 16, device=gpu)
    ))


def test_extractors(gpu, monkeypatch):
    images = torch.rand(3, 3, 32, 32, device=gpu)
    distance = ReconstructionDistance(gpu)
    for _ in range(2):
        distance.add(images, images.flip(3))
        assert distance.take()["frechet"] > 0
    monkeypatch.setitem(features.FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", TinyExtractor)
    H = SimpleNamespace(feature_extractor="inception", feature_extractor_weights=None)
    extract = features.Extractor(H, gpu, ["fid", "isc"])
    found = extract((255 * images[:, :1]).to(torch.uint8))
    assert all(value.device.type == "cpu" for value in found.values())
