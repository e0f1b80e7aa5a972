"""The parts of training against their formulas: schedule, EMA, precision, clipping, validation."""

import math
import types

import numpy as np
import pytest
import torch

import train_sampler
import train_vqgan
from helpers import ON_DIGITS
from hparams import get_sampler_hparams, get_vqgan_hparams
from models import VQGAN, AbsorbingDiffusion, Transformer
from models.autoencoder.autoencoder import VQAutoEncoder
from models.devices import find_compiler_problem, to_device
from models.prior.absorbing_diffusion import diffusion_losses, draw_mask, draw_times
from models.sampling.samplers import sample_mask_predict
from utils.data.batches import RepeatedBatches
from utils.data.pixels import to_uint8
from utils.evaluation.metrics import FeatureStatistics, frechet_distance, psnr
from utils.evaluation.reconstruction import ReconstructionDistance
from utils.training import precision as precision_module
from utils.training.ema import EMA
from utils.training.optimizers import (
    Muon, MuonWithAdamW, build_optimizer, is_inner_convolution, learning_rate,
)
from utils.training.precision import Precision, measuring_arithmetic, seed_step, training_arithmetic
from utils.training.processes import Processes
from utils.training.step import backward, take_step

CPU = torch.device("cpu")
DIGITS = f"{ON_DIGITS} --img_size 16 --ch_mult 1 1 --attn_resolutions 8 --disc_layers 1"
PRIOR = (
    "--sampler absorbing --ae_load_dir none --ae_load_step 1 --bert_n_emb 32 --bert_n_head 4 "
    "--bert_n_layers 1 --total_steps 8"
)


def settings(schedule):
    return types.SimpleNamespace(
        lr=2.0, warmup_iters=10, train_steps=110, lr_schedule=schedule
    )


def test_learning_rate_follows_its_schedule():
    for schedule in ("constant", "cosine", "linear"):
        assert learning_rate(settings(schedule), 5) == pytest.approx(1.0)
        assert learning_rate(settings(schedule), 10) == pytest.approx(2.0)
    assert learning_rate(settings("constant"), 10**9) == 2.0
    assert learning_rate(settings("linear"), 35) == pytest.approx(1.5)
    assert learning_rate(settings("cosine"), 35) == pytest.approx(1 + math.sqrt(0.5))
    assert learning_rate(settings("cosine"), 110) == pytest.approx(0, abs=1e-12)


def test_muon_takes_convolutions_as_matrices_of_all_their_taps():
    torch.manual_seed(0)
    convolution, matrix = torch.nn.Conv2d(4, 6, 3, bias=False), torch.nn.Linear(36, 6, bias=False)
    matrix.weight.data = convolution.weight.data.flatten(1).clone()
    x = torch.randn(5, 4, 3, 3)
    for module, images in ((convolution, x), (matrix, x.flatten(1))):
        optimizer = Muon(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(images).square().sum().backward()
            optimizer.step()
    assert torch.allclose(convolution.weight.flatten(1), matrix.weight, atol=1e-5)
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_muon_of_an_autoencoder_leaves_colours_and_codebook_to_adamw():
    H = types.SimpleNamespace(
        img_size=16, n_channels=3, nf=32, ch_mult=[1, 1], res_blocks=1, attn_resolutions=[],
        emb_dim=8, codebook_size=5, latent_shape=[1, 8, 8], quantizer="nearest", beta=0.25,
        optimizer="muon", lr=1e-3, weight_decay=0.0,
    )
    model = VQAutoEncoder(H)
    optimizer = build_optimizer(model, H, is_inner_convolution)
    of_muon = {id(p) for group in optimizer.parts["muon"].param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in of_muon}
    first, last = "encoder.blocks.0.weight", f"generator.blocks.{len(model.generator.blocks) - 1}"
    assert "encoder.blocks.1.conv1.weight" in names and "generator.blocks.0.weight" in names
    assert not names & {first, f"{last}.weight", "quantize.embedding.weight"}
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))


def test_ema_is_the_weighted_mean_and_copies_buffers():
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, 0.75)
    for n, value in enumerate((1.0, 2.0), start=1):
        torch.nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        ema.update(n)
    # started at 1: 0.75 * (0.75 * 1 + 0.25 * 1) + 0.25 * 2
    assert torch.allclose(ema.model.weight, torch.full((2,), 1.25))
    assert torch.equal(ema.model.running_mean, torch.full((2,), 2.0))
    assert not ema.model.training and not ema.model.weight.requires_grad


def test_ema_with_warmup_follows_from_the_first_updates_on():
    model = torch.nn.Linear(1, 1)
    plain, warm = EMA(model, 0.999), EMA(model, 0.999, warmup=True)
    torch.nn.init.constant_(model.weight, 1.0)
    for n in range(1, 51):
        plain.update(n)
        warm.update(n)
    left = math.prod((n + 1) / (n + 10) for n in range(1, 51))  # of the random start
    start = (plain.model.weight - 1) / 0.999**50
    assert torch.allclose(warm.model.weight, 1 + left * start, atol=1e-6)
    assert left < 1e-6
    late = EMA(model, 0.9, warmup=True)
    late.model.weight.add_(1)
    late.update(10**6)  # then beta is the limit
    assert torch.allclose(late.model.weight, model.weight + 0.9)


def test_ema_shares_the_tensors_and_modules_that_never_change():
    model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(2, 2), "live": torch.nn.Linear(2, 2)})
    model.frozen, model.live = model["frozen"], model["live"]
    ema = EMA(model, 0.5, shared=["frozen"])
    assert ema.model.frozen is model.frozen and ema.model.live is not model.live
    assert {id(tensor) for tensor in ema.values} == {id(p) for p in model.live.parameters()}


def test_amp_uses_bfloat16_only_where_the_cpu_has_it(monkeypatch):
    for has_units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision_module, "cpu_has_bfloat16", lambda: has_units)
        precision = Precision(True, CPU)
        with precision.autocast():
            product = torch.nn.Linear(4, 4)(torch.zeros(1, 4))
        assert product.dtype == precision.dtype == dtype
        assert ("set aside" in precision.description) == (not has_units)
    assert Precision(False, CPU).dtype == torch.float32
    assert not precision.scaler.is_enabled()


@pytest.mark.parametrize("amp, has_units", [(True, True), (True, False), (False, True)])
def test_muon_uses_bfloat16_only_where_the_network_does(amp, has_units, monkeypatch):
    monkeypatch.setattr(precision_module, "cpu_has_bfloat16", lambda: has_units)
    H = types.SimpleNamespace(optimizer="muon", lr=1e-3, weight_decay=0.0)
    model = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(
        model, H, lambda name, parameter: parameter.dim() == 2, Precision(amp, CPU).dtype
    )
    dtypes = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: dtypes.append(a.dtype) or product(a, b))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert set(dtypes) == {torch.bfloat16 if amp and has_units else torch.float32}


def step(loss, optimizer, precision, clip=0.0):
    """The Outcome of one step on a loss."""
    optimizer.zero_grad()
    backward(loss, precision)
    return take_step([loss], [optimizer], precision, Processes(), clip)


def test_clipping_limits_the_gradient():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    step((weight**2).sum() / 2, optimizer, Precision(False, CPU), 0.5)
    assert torch.allclose(weight, torch.tensor([2.7, 3.6]), atol=1e-5)  # 0.5 along (0.6, 0.8)


def test_a_scaler_that_overflows_skips_muon_and_adamw_together():
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3)])

    model = Blocks()
    optimizer = MuonWithAdamW(model, lr=0.1)
    precision = Precision(False, CPU)
    precision.scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bias, weight = model.blocks[0].bias, model.blocks[0].weight
    loss = bias.sum() * float("inf") + weight.sum()
    # not the scale's doing: the loss itself is infinite
    assert step(loss, optimizer, precision, 1.0).bad
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
    loss = 1e3 * (bias + weight).sum()  # overflows float32: passed over
    assert not step(loss, optimizer, precision, 1.0).bad
    assert precision.scaler.get_scale() == 2.0**126
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    step((bias + weight).sum(), optimizer, precision, 1.0)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name])


def test_a_frozen_module_computes_what_it_did_under_autocast():
    precision = Precision(False, CPU)
    precision.dtype = torch.bfloat16
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(9, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)]
    module, ids = torch.nn.Sequential(*layers).requires_grad_(False), torch.arange(9)
    with precision.autocast():
        expected = module(ids)
        assert torch.equal(precision.frozen(module)(ids), expected)
    assert module[2].weight.dtype == torch.bfloat16 and module[1].weight.dtype == torch.float32
    assert Precision(False, CPU).frozen(torch.nn.Linear(2, 2)).weight.dtype == torch.float32


def test_what_is_measured_during_training_is_not_in_tf32():
    H = types.SimpleNamespace(tf32=True, deterministic=False)

    def allowed():
        convolutions = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), convolutions.allow_tf32, convolutions.benchmark

    with training_arithmetic(H):
        assert allowed() == ("high", True, True)
        with measuring_arithmetic():
            assert allowed() == ("highest", False, False)
        assert allowed() == ("high", True, True)
    assert allowed() == ("highest", False, False)


def test_what_cannot_be_compiled_is_said_in_a_sentence():
    assert find_compiler_problem("mps") == "nothing is compiled for mps"


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 1, 4, 4)
    others = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)])
    assert torch.allclose(psnr(images, others), torch.tensor([20.0, 40.0], dtype=torch.float64))


class Images:
    """Seven images of a dataset, whose mean depends on counting each once."""

    name, embedded, img_size, n_channels = "seven", True, 16, 1

    def __len__(self):
        return 7

    def pixels(self, index):
        return torch.full((1, 16, 16), 36 * index, dtype=torch.uint8)


class Log:
    """Keeps what validation shows."""

    def bars(self, step, name, values):
        self.usage = values


def training_of(kind, **attributes):
    """A training of `kind` that has no more than what is given."""
    training = kind.__new__(kind)
    training.__dict__ |= dict(attributes, processes=Processes(), log=Log(), compiled=False)
    return training


def test_validation_of_the_autoencoder_is_the_mean_over_images():
    torch.manual_seed(0)
    H = get_vqgan_hparams([*DIGITS.split(), "--batch_size", "3"])
    vqgan = VQGAN(H).eval()
    training = training_of(
        train_vqgan.VQGANTraining, H=H, vqgan=vqgan, best=vqgan, ema=None,
        looked_at=RepeatedBatches(Images(), 3, 0, CPU, None), distance=ReconstructionDistance(CPU),
        perceptual=None,  # the images are too small for one
    )
    (values, known), usage = training.validate(1), training.log.usage
    images = torch.stack([Images().pixels(index) for index in range(7)]) / 255
    with torch.no_grad():
        reconstructions, _, _, ids = vqgan.ae(images)
    assert values["l1"] == pytest.approx(float((images - reconstructions).abs().mean()), rel=1e-5)
    expected = psnr(images, reconstructions.clamp(0, 1)).mean()
    assert values["psnr"] == pytest.approx(float(expected), rel=1e-5)
    counts = torch.bincount(ids.flatten(), minlength=H.codebook_size)
    assert torch.allclose(usage, counts / counts.sum())
    assert values["perceptual"] == 0
    assert known == dict(values, of_weights=values["l1"], ids_seen=ids.numel())
    pairs = [to_uint8(part) for part in (images, reconstructions)]
    statistics = [FeatureStatistics(), FeatureStatistics()]
    for part, of_part in zip(pairs, statistics):
        of_part.update(training.distance.extract(part)["fid"])
    expected = frechet_distance(*statistics[0].finish(), *statistics[1].finish())
    assert values["frechet"] == pytest.approx(expected, rel=1e-6)
    assert training.validate(2)[0] == values  # the images' features are kept


def prior(flags=""):
    torch.manual_seed(0)
    H = get_sampler_hparams(f"{DIGITS} {PRIOR} {flags}".split())
    return H, AbsorbingDiffusion(H, Transformer(H), H.codebook_size, torch.zeros(32, 32)).eval()


def test_validation_of_the_sampler_is_repeatable_and_ignores_the_mask_schedule():
    def validate(model, H):
        training = training_of(
            train_sampler.SamplerTraining, H=H, sampler=model, best=model, looked_at=ids,
            precision=Precision(False, CPU),
        )
        return training.validate()[0]

    H, model = prior()
    ids = torch.randint(H.codebook_size, (10, H.block_size))
    first = validate(model, H)
    assert first == validate(model, H)
    fixed, same_model = prior("--mask_schedule fixed")
    assert validate(same_model, fixed) == first
    untrained = math.log2(H.codebook_size)
    assert first["bits_per_token"] == pytest.approx(untrained, abs=0.4)


@pytest.mark.parametrize("loss_type", ["elbo", "reweighted_elbo", "mlm"])
def test_loss_type_selects_the_training_loss(loss_type):
    H, model = prior(f"--loss_type {loss_type}")
    ids = torch.randint(H.codebook_size, (6, 64))
    seed_step(0, 1)
    stats = model(ids)
    seed_step(0, 1)
    t = draw_times(6, 8, model.low_discrepancy)
    mask = draw_mask(t, 64, 8)
    logits = model._denoise_fn(ids.masked_fill(mask, model.mask_id))
    losses = diffusion_losses(logits, ids, mask, t, 8)
    assert float(stats["loss"]) == pytest.approx(float(losses[loss_type].mean()), rel=1e-6)
    assert float(stats["bits_per_token"]) == pytest.approx(float(losses["elbo"].mean()), rel=1e-6)


def test_mask_predict_remasks_with_falling_probability():
    shares = []

    def denoise(ids, where):
        assert torch.equal(where, ids == 4)
        shares.append(float(where.float().mean()))
        return torch.zeros(int(where.sum()), 4)

    sample_mask_predict(denoise, torch.full((200, 50), 4), 4, 4, total_steps=100)
    assert shares == pytest.approx([1.0, 0.67, 0.34, 0.01], abs=0.03)


def test_arrays_go_to_a_device_as_rows():
    """A GPU would be waited for where it has to copy every second number."""
    columns = np.ones((3, 2), bool).nonzero()
    assert not columns[1].flags.c_contiguous
    for array in (*columns, np.asfortranarray(np.ones((3, 2))), np.array(1.0)):
        tensor = to_device(array, CPU)
        assert tensor.is_contiguous() and np.array_equal(tensor.numpy(), array)
