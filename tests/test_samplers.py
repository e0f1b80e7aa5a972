"""The diffusion and its samplers: exact distributions on toys, schedules, histories, caches."""

import itertools
import math

import pytest
import torch

from hparams import get_sampler_hparams
from models import AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.absorbing_diffusion import diffusion_losses, draw_mask, draw_times
from models.samplers import draw, sample_ancestral, sample_mask_predict

FLAGS = (
    "--dataset digits --ae_load_dir none --ae_load_step 1 --img_size 32 --codebook_size 12 "
    "--bert_n_emb 32 --bert_n_head 4 --bert_n_layers 2 --total_steps 16 --sampler"
).split()
TOKENS, CODES = 3, 2


class Toy:
    """A denoiser with arbitrary, mutually inconsistent conditionals: a table over all inputs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        inputs = (CODES + 1,) * TOKENS
        self.table = torch.randn(*inputs, TOKENS, CODES, generator=generator) * 1.5
        self.batches = []

    def __call__(self, ids):
        self.batches.append(len(ids))
        return self.table[tuple(ids.T)]


def step_by_step(toy, steps):
    """The exact output distribution of the plain loop t = S..1: {ids: probability}."""
    states = {(CODES,) * TOKENS: 1.0}
    for t in range(steps, 0, -1):
        following = {}
        for state, weight in states.items():
            probabilities = toy.table[state].softmax(-1).tolist()
            options = []
            for position, token in enumerate(state):
                if token != CODES:
                    options.append([(token, 1.0)])
                    continue
                drawn = [(code, probabilities[position][code] / t) for code in range(CODES)]
                options.append([*drawn, (CODES, 1 - 1 / t)])
            for choice in itertools.product(*options):
                key = tuple(token for token, _ in choice)
                share = weight * math.prod(p for _, p in choice)
                following[key] = following.get(key, 0.0) + share
        states = following
    return states


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_ancestral_has_the_distribution_of_the_plain_loop(steps):
    toy = Toy()
    exact = step_by_step(toy, steps)
    n = 200_000
    ids = sample_ancestral(
        toy, n, TOKENS, CODES, steps, generator=torch.Generator().manual_seed(steps)
    )
    values, counts = ids.unique(dim=0, return_counts=True)
    found = {tuple(v): c for v, c in zip(values.tolist(), counts.tolist())}
    outcomes = list(itertools.product(range(CODES), repeat=TOKENS))
    assert sum(exact.get(o, 0) for o in outcomes) == pytest.approx(1)
    statistic = sum((found.get(o, 0) - n * exact[o]) ** 2 / (n * exact[o]) for o in outcomes)
    assert statistic < 24.3  # chi-square, 7 degrees of freedom: p = 0.001


def test_ancestral_wastes_no_call():
    toy = Toy()
    torch.manual_seed(0)
    sample_ancestral(toy, 50, TOKENS, CODES, 1000)
    assert len(toy.batches) == TOKENS  # 1000 steps, but no more events than tokens
    assert toy.batches == sorted(toy.batches, reverse=True)


def test_draws_follow_the_temperature():
    logits = torch.tensor([[1.0, 0.0, -2.0]]).expand(100_000, -1)
    for temp in (0.5, 1.0, 2.0):
        counts = torch.bincount(draw(logits, temp, torch.Generator().manual_seed(0)))
        expected = (logits[0] / temp).softmax(-1)
        assert torch.allclose(counts / 100_000, expected, atol=0.006)


def test_mask_predict_fills_every_token():
    ids = sample_mask_predict(Toy(), 64, TOKENS, CODES, total_steps=16, sample_steps=5)
    assert ids.shape == (64, TOKENS) and ids.max() < CODES and len(ids.unique(dim=0)) > 1


def test_times_are_uniform_and_spread():
    for low_discrepancy in (False, True):
        generator = torch.Generator().manual_seed(0)
        t = torch.cat([draw_times(10, 16, low_discrepancy, generator) for _ in range(8000)])
        counts = torch.bincount(t, minlength=17)
        assert counts[0] == 0 and len(counts) == 17
        assert torch.allclose(counts[1:] / len(t), torch.full((16,), 1 / 16), atol=0.004)
    assert sorted(draw_times(16, 16, True).tolist()) == list(range(1, 17))


def test_mask_schedules():
    t = torch.tensor([1, 8, 16]).repeat(4000)
    share = draw_mask(t, 20, 16, "random").float().view(4000, 3, 20).mean((0, 2))
    assert torch.allclose(share, torch.tensor([1 / 16, 1 / 2, 1.0]), atol=0.01)
    fixed = draw_mask(t, 20, 16, "fixed")
    assert fixed.sum(1).view(4000, 3).unique(dim=0).tolist() == [[1, 10, 20]]
    assert torch.allclose(fixed.float().mean(0), torch.full((20,), 31 / 60), atol=0.02)


def test_elbo_is_unbiased_for_the_exact_bound():
    """Mean over t and masks of the elbo loss = the bound summed by enumeration."""
    toy, ids, total = Toy(), torch.tensor([[0, 1, 1]]), 4
    exact = 0.0
    log_probabilities = {}
    for pattern in itertools.product([False, True], repeat=TOKENS):
        mask = torch.tensor([pattern])
        logits = toy(ids.masked_fill(mask, CODES))
        ce = -logits.log_softmax(-1)[0, range(TOKENS), ids[0]]
        log_probabilities[pattern] = float(ce[list(pattern)].sum())
    for t in range(1, total + 1):
        for pattern, ce in log_probabilities.items():
            weight = math.prod(t / total if masked else 1 - t / total for masked in pattern)
            exact += weight * ce / t / (TOKENS * math.log(2))
    generator = torch.Generator().manual_seed(0)
    many = ids.expand(200_000, -1)
    t = draw_times(len(many), total, True, generator)
    mask = draw_mask(t, TOKENS, total, "random", generator)
    losses = diffusion_losses(toy(many.masked_fill(mask, CODES)), many, mask, t, total)
    assert float(losses["elbo"].mean()) == pytest.approx(exact, rel=0.01)


def test_histories_average_with_decay():
    H = get_sampler_hparams([*FLAGS, "absorbing"])
    model = AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4))
    model.update_histories(
        torch.tensor([3, 3, 5]), torch.tensor([1.0, 3.0, 7.0]), torch.tensor([2.0, 2.0, 3.0])
    )
    model.update_histories(torch.tensor([3]), torch.tensor([12.0]), torch.tensor([4.0]))
    assert model.loss_history[3] == pytest.approx(0.9 * 2 + 0.1 * 12)
    assert model.Lt_history[3] == pytest.approx(0.9 * 4 + 0.1 * 16)
    assert model.loss_history[5] == 7 and model.Lt_history[5] == 9
    assert model.Lt_count.tolist() == [0, 0, 0, 3, 0, 1, *[0] * 11]


@pytest.mark.parametrize("kind", ["absorbing", "autoregressive"])
def test_models_learn_a_constant(kind):
    """A few steps on one repeated grid bring the bits per token down, samples then repeat it."""
    torch.manual_seed(0)
    H = get_sampler_hparams([*FLAGS, kind])
    if kind == "absorbing":
        model = AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4))
    else:
        model = AutoregressiveTransformer(H, torch.zeros(12, 4))
    ids = torch.randint(12, (1, 64)).expand(16, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert float(model.bits_per_token(ids).mean()) < 0.5
    samples = model.sample(4, temp=0.5, sample_steps=8)
    assert (samples == ids[:4]).float().mean() > 0.95


def test_autoregressive_cache_gives_the_same_ids():
    torch.manual_seed(0)
    H = get_sampler_hparams([*FLAGS, "autoregressive"])
    model = AutoregressiveTransformer(H, torch.zeros(12, 4)).eval()
    fast = model.sample(3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    slow = torch.empty(3, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(64):
            token = draw(model.net(slow)[:, -1], 1.0, generator)
            slow = torch.cat((slow, token[:, None]), dim=1)
    assert torch.equal(fast, slow)


def test_embed_lays_codes_out_row_by_row():
    H = get_sampler_hparams([*FLAGS, "absorbing"])
    model = AbsorbingDiffusion(H, Transformer(H), 12, torch.arange(24.0).view(12, 2))
    ids = torch.randint(12, (2, 64))
    grid = model.embed(ids)
    assert grid.shape == (2, 2, 8, 8)
    assert torch.equal(grid[1, :, 2, 3], model.embedding_weight[ids[1, 2 * 8 + 3]])


@pytest.mark.parametrize("position", ["rpb", "rope", "rpb rope"])
def test_relative_positions_run_at_twice_the_size(position):
    """No table of positions: any grid, and logits that move with the ids away from borders."""
    torch.manual_seed(0)
    flags = f"absorbing --kernel_sizes 3 5 --position {position}"
    net = Transformer(get_sampler_hparams([*FLAGS, *flags.split()])).eval().double()
    assert net.grid == (8, 8)
    ids = torch.randint(13, (1, 20, 20))
    logits = net(ids.flatten(1), grid=(20, 20)).view(20, 20, 12)
    moved = net(ids.roll((3, 2), dims=(1, 2)).flatten(1), grid=(20, 20)).view(20, 20, 12)
    inner = slice(7, -5)  # two blocks that each reach 2 tokens, and what the roll brought round
    assert torch.allclose(moved[inner, inner], logits.roll((3, 2), dims=(0, 1))[inner, inner])
    corner = moved[:3, :3] - logits.roll((3, 2), dims=(0, 1))[:3, :3]
    assert corner.abs().max() > 1e-6


def test_a_table_of_positions_ties_to_its_grid():
    H = get_sampler_hparams([*FLAGS, "absorbing"])
    with pytest.raises(ValueError, match="absolute positions"):
        Transformer(H)(torch.zeros(1, 140, dtype=torch.long), grid=(10, 14))
