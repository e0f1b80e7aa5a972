"""The diffusion and its samplers: exact distributions on toys, schedules, histories, caches."""

import copy
import itertools
import math

import pytest
import torch
from scipy.stats import chi2

from helpers import ON_DIGITS, assert_close
from hparams import get_sampler_hparams
from hparams.groups import Sampler
from models import SAMPLERS, AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.prior.absorbing_diffusion import diffusion_losses, draw_mask, draw_times
from models.sampling.samplers import (
    cosine_schedule, draw, halton_order, sample_ancestral, sample_autoregressive, sample_confidence,
    sample_first_hitting, sample_halton, sample_mask_predict, sample_remdm, truncate,
)

FLAGS = (
    f"{ON_DIGITS} --ae_load_dir none --ae_load_step 1 --img_size 32 --codebook_size 12 "
    "--bert_n_emb 32 --bert_n_head 4 --bert_n_layers 2 --total_steps 16 --sampler"
).split()
TOKENS, K = 3, 2  # K is the size of the codebook and the id of the mask


class Toy:
    """A denoiser with arbitrary, mutually inconsistent conditionals: a table over all inputs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        inputs = (K + 1,) * TOKENS
        self.table = torch.randn(*inputs, TOKENS, K, generator=generator) * 1.5
        self.calls = []  # (samples, tokens asked for) of each

    def __call__(self, ids, where):
        self.calls.append((len(ids), int(where.sum())))
        return self.table[tuple(ids.T)][where]

    def start(self, n, known=()):
        """Masked ids [n, N], but for what `known` [(position, token)] says."""
        ids = torch.full((n, TOKENS), K)
        for position, token in known:
            ids[:, position] = token
        return ids


def step_by_step(toy, steps, start, remask=0.0):
    """The exact output distribution of the plain loop t = S..1: {ids: probability}.

    With `remask` that of ReMDM, computed from the marginals: the share a of unmasked tokens is
    1 - t/S, a drawn token is masked again with probability s and a masked one drawn with
    probability (a' - (1 - s) a) / (1 - a).
    """
    states = {start: 1.0}
    known = [token != K for token in start]
    for t in range(steps, 0, -1):
        share, after = 1 - t / steps, 1 - (t - 1) / steps
        again = remask * min(1.0, (1 - after) / share) if share > 0 else 0.0
        reveal = (after - (1 - again) * share) / (1 - share)
        following = {}
        for state, weight in states.items():
            probabilities = toy.table[state].softmax(-1).tolist()
            options = []
            for position, token in enumerate(state):
                if known[position]:
                    options.append([(token, 1.0)])
                elif token != K:
                    options.append([(token, 1 - again), (K, again)])
                else:
                    drawn = [p * reveal for p in probabilities[position]]
                    options.append([*enumerate(drawn), (K, 1 - reveal)])
            for choice in itertools.product(*options):
                key = tuple(token for token, _ in choice)
                share_of_choice = weight * math.prod(p for _, p in choice)
                following[key] = following.get(key, 0.0) + share_of_choice
        states = following
    return states


def in_random_order(toy, start, each=1):
    """The exact output distribution when masked tokens are drawn `each` at a time, any order."""
    masked = [position for position, token in enumerate(start) if token == K]
    found = {}
    orders = list(itertools.permutations(masked))
    for order in orders:
        states = {start: 1 / len(orders)}
        for first in range(0, len(order), each):
            following = {}
            for state, weight in states.items():
                probabilities = toy.table[state].softmax(-1).tolist()
                group = order[first : first + each]
                for tokens in itertools.product(range(K), repeat=len(group)):
                    key, p = list(state), weight
                    for position, token in zip(group, tokens):
                        key[position] = token
                        p *= probabilities[position][token]
                    following[tuple(key)] = following.get(tuple(key), 0.0) + p
            states = following
        for key, weight in states.items():
            found[key] = found.get(key, 0.0) + weight
    return found


def assert_distributed(ids, exact):
    """Chi-square test of ids [n, N] against {ids: probability}, rejecting at p = 0.001."""
    n = len(ids)
    values, counts = ids.unique(dim=0, return_counts=True)
    found = {tuple(v): c for v, c in zip(values.tolist(), counts.tolist())}
    exact = {outcome: p for outcome, p in exact.items() if p > 0}
    assert sum(exact.values()) == pytest.approx(1) and set(found) <= set(exact)
    statistic = sum((found.get(o, 0) - n * p) ** 2 / (n * p) for o, p in exact.items())
    assert statistic < chi2.ppf(0.999, len(exact) - 1)


KNOWN = [(), ((1, 0),)]
DRAWS = 200_000


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("known", KNOWN)
def test_ancestral_has_the_distribution_of_the_plain_loop(steps, known):
    toy = Toy()
    start = toy.start(DRAWS, known)
    generator = torch.Generator().manual_seed(steps)
    ids = sample_ancestral(toy, start, K, steps, rng=generator)
    assert_distributed(ids, step_by_step(toy, steps, tuple(start[0].tolist())))


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("known", KNOWN)
def test_remdm_without_remasking_is_ancestral(steps, known):
    toy = Toy()
    start = toy.start(DRAWS, known)
    generator = torch.Generator().manual_seed(steps)
    ids = sample_remdm(toy, start, K, steps, rng=generator, remask=0.0)
    assert_distributed(ids, step_by_step(toy, steps, tuple(start[0].tolist())))


@pytest.mark.parametrize("known", KNOWN)
def test_remdm_has_the_distribution_of_its_posterior(known):
    toy = Toy()
    start = toy.start(DRAWS, known)
    ids = sample_remdm(
        toy, start, K, 6, rng=torch.Generator().manual_seed(0), remask=0.7
    )
    exact = step_by_step(toy, 6, tuple(start[0].tolist()), remask=0.7)
    assert_distributed(ids, exact)
    plain = step_by_step(toy, 6, tuple(start[0].tolist()))
    assert max(abs(exact[ids] - plain[ids]) for ids in exact if K not in ids) > 0.01


@pytest.mark.parametrize("steps", [100, 3, 2, 1])
@pytest.mark.parametrize("known", KNOWN)
def test_first_hitting_has_its_analytic_distribution(steps, known):
    toy = Toy()
    start = toy.start(DRAWS, known)
    each = -(-(TOKENS - len(known)) // steps)
    generator = torch.Generator().manual_seed(steps)
    ids = sample_first_hitting(toy, start, K, steps, rng=generator)
    assert_distributed(ids, in_random_order(toy, tuple(start[0].tolist()), each))


def test_known_tokens_condition_a_consistent_denoiser():
    """With the conditionals of one joint distribution, the samples have its conditional."""
    joint = torch.rand((K,) * TOKENS, generator=torch.Generator().manual_seed(1)) ** 2
    joint = joint / joint.sum()
    toy = Toy()
    for state in itertools.product(range(K + 1), repeat=TOKENS):
        agrees = joint[tuple(slice(None) if token == K else slice(token, token + 1)
                             for token in state)]
        for position, token in enumerate(state):
            if token == K:
                others = [axis for axis in range(TOKENS) if axis != position]
                toy.table[state][position] = agrees.sum(others).log()
    expected = joint[:, 0] / joint[:, 0].sum()
    exact = {(a, 0, c): float(expected[a, c]) for a in range(K) for c in range(K)}
    for sample, options in [(sample_first_hitting, {}), (sample_ancestral, {})]:
        steps = 3 if sample is sample_first_hitting else 10**9  # never two at once
        generator = torch.Generator().manual_seed(5)
        start = toy.start(DRAWS, [(1, 0)])
        ids = sample(toy, start, K, steps, rng=generator, **options)
        assert_distributed(ids, exact)


def test_ancestral_asks_the_network_once_for_each_token():
    toy = Toy()
    torch.manual_seed(0)
    sample_ancestral(toy, toy.start(50), K, 1000)
    samples, tokens = zip(*toy.calls)
    assert len(samples) == TOKENS  # 1000 steps, but no more events than tokens
    assert list(samples) == sorted(samples, reverse=True)
    assert sum(tokens) == 50 * TOKENS  # each token is asked for once
    toy.calls.clear()
    sample_ancestral(toy, toy.start(50, [(0, 1)]), K, 1000)
    assert sum(tokens for _, tokens in toy.calls) == 50 * (TOKENS - 1)


GRID = (4, 6)


def uniform_denoiser(size=5):
    calls = []

    def denoise(ids, where):
        calls.append(where.sum(1))
        return torch.zeros(int(where.sum()), size)

    return denoise, calls


@pytest.mark.parametrize("steps", [1, 4, 8, 17, 24, 100])
@pytest.mark.parametrize("sample, options", [
    (sample_ancestral, {}), (sample_first_hitting, {}), (sample_confidence, {}),
    (sample_halton, dict(grid=GRID)), (sample_remdm, {}),
    (sample_mask_predict, dict(total_steps=16)),
])
def test_every_method_completes_and_keeps_known_ids(sample, options, steps):
    denoise, calls = uniform_denoiser()
    start = torch.full((3, 24), 5)
    start[1, :7], start[2] = 2, 3  # one sample has known tokens, one has nothing else
    before = start.clone()
    torch.manual_seed(0)
    seen = []

    def progress(done, total, ids):
        seen.append((done, total, ids.clone()))

    ids = sample(denoise, start, 5, steps, progress=progress, **options)
    assert torch.equal(start, before), "the caller's tensor is not written to"
    assert torch.equal(seen[-1][2], ids)
    assert all((part[1, :7] == 2).all() and (part[2] == 3).all() for *_, part in seen)
    if sample not in (sample_remdm, sample_mask_predict):  # what is drawn stays
        for (*_, earlier), (*_, later) in zip(seen, seen[1:]):
            assert ((earlier == 5) | (earlier == later)).all()
            assert (later == 5).sum() < (earlier == 5).sum()
    assert ids.max() < 5 and (ids[1, :7] == 2).all() and (ids[2] == 3).all()
    assert len(calls) <= steps and seen[-1][0] == len(seen)
    if sample in (sample_first_hitting, sample_halton):
        assert len(calls) == min(steps, 24)


def test_the_table_names_the_choices_of_sample_type():
    choices = Sampler.__dataclass_fields__["sample_type"].metadata["choices"]
    assert sorted(SAMPLERS) == sorted(choices)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_model_draws_by_the_method_of_the_table(name):
    """The same ids as the method's function with the settings written out."""
    torch.manual_seed(0)
    H = get_sampler_hparams([*FLAGS, "absorbing", "--sample_type", name])
    H.choice_temp, H.remask = 2.5, 0.3
    model = AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4)).eval()
    ids = model.sample(2, 0.8, 6, rng=torch.Generator().manual_seed(1))
    options = {
        "mlm": dict(total_steps=16), "confidence": dict(choice_temp=2.5),
        "halton": dict(grid=(8, 8)), "remdm": dict(remask=0.3),
    }.get(name, {})
    expected = SAMPLERS[name].sample(
        lambda ids, where: model._denoise_fn(ids)[where], torch.full((2, 64), 12), 12, 6, 0.8,
        torch.Generator().manual_seed(1), None, **options,
    )
    assert torch.equal(ids, expected) and ids.max() < 12


def test_cosine_schedule():
    left = cosine_schedule(torch.tensor([16, 3, 0]), 8)
    assert left[0].tolist() == [15, 14, 13, 11, 8, 6, 3, 0]
    assert left[1].tolist() == [2, 1, 0, 0, 0, 0, 0, 0] and left[2].max() == 0


def test_halton_order_spreads():
    order = halton_order(8, 8)
    assert sorted(order.tolist()) == list(range(64))
    rows, columns = order // 8, order % 8
    first = torch.stack((rows, columns), 1)[:16].double()
    apart = torch.cdist(first, first).fill_diagonal_(99).amin(1)
    assert apart.mean() > 1.5 and apart.min() > 1  # neighbours and random cells lie closer


def test_confidence_keeps_the_surest():
    def denoise(ids, where):  # the surer the further right; id 0 at a low temperature
        sure = torch.linspace(1, 9, 24).expand(len(ids), 24)[where]
        return torch.stack((sure, torch.zeros_like(sure)), dim=1)

    kept = []
    start = torch.full((1, 24), 2)

    def watch(ids, where):
        kept.append(set((~where[0]).nonzero().flatten().tolist()))
        return denoise(ids, where)

    ids = sample_confidence(watch, start, 2, 6, temp=0.01, choice_temp=0.0)
    assert (ids == 0).all()
    for earlier, later in zip(kept, kept[1:]):
        assert earlier < later and later == set(range(24 - len(later), 24))


def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    kept = truncate(logits, top_k=2).isfinite()
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert truncate(logits, top_p=0.79).isfinite().sum(1).tolist() == [2, 2]
    assert truncate(logits, top_p=0.81).isfinite().sum(1).tolist() == [3, 3]
    assert truncate(logits, top_p=0.01).isfinite().sum(1).tolist() == [1, 1]
    assert torch.equal(truncate(logits), logits)


def test_draws_follow_the_temperature():
    logits = torch.tensor([[1.0, 0.0, -2.0]]).expand(100_000, -1)
    for temp in (0.5, 1.0, 2.0):
        counts = torch.bincount(draw(logits, temp, torch.Generator().manual_seed(0)))
        expected = (logits[0] / temp).softmax(-1)
        assert torch.allclose(counts / 100_000, expected, atol=0.006)


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


def variational_bound(toy, ids, steps):
    """The bound on -log p(ids) in nats by its definition: at each t, averaged over all x_t, the
    KL divergence of the reverse step from the posterior, summed over all x_{t-1}."""
    bound = 0.0
    for t in range(1, steps + 1):
        for hidden in itertools.product([False, True], repeat=TOKENS):
            share = math.prod(t / steps if h else 1 - t / steps for h in hidden)
            state = tuple(K if h else token for h, token in zip(hidden, ids))
            probabilities = toy.table[state].softmax(-1).tolist()
            outcomes = []  # of each token: (posterior, reverse)
            for position, h in enumerate(hidden):
                drawn = (1 / t, probabilities[position][ids[position]] / t)
                outcomes.append([drawn, (1 - 1 / t, 1 - 1 / t)] if h else [(1.0, 1.0)])
            for choice in itertools.product(*outcomes):
                posterior, reverse = (math.prod(each) for each in zip(*choice))
                if share and posterior:
                    bound += share * posterior * math.log(posterior / reverse)
    return bound


BOUND_STEPS, BOUND_GRID = 4, (0, 1, 1)


def test_mean_elbo_loss_is_the_variational_bound():
    """The elbo loss, averaged over all times and masks, is the variational bound."""
    toy, ids = Toy(), torch.tensor([BOUND_GRID])
    mean = 0.0
    for t in range(1, BOUND_STEPS + 1):
        for hidden in itertools.product([False, True], repeat=TOKENS):
            share = t / BOUND_STEPS
            weight = math.prod(share if h else 1 - share for h in hidden) / BOUND_STEPS
            mask = torch.tensor([hidden])
            logits = toy.table[tuple(ids.masked_fill(mask, K).T)]
            losses = diffusion_losses(logits, ids, mask, torch.tensor([t]), BOUND_STEPS)
            mean += weight * float(losses["elbo"])
    exact = variational_bound(toy, BOUND_GRID, BOUND_STEPS)
    assert mean * TOKENS * math.log(2) == pytest.approx(exact, rel=1e-6)
    likelihood = step_by_step(toy, BOUND_STEPS, (K,) * TOKENS)[BOUND_GRID]
    assert exact > -math.log(likelihood)


@pytest.mark.parametrize("draws", [0, 1, 2, 3, 4, 7])
def test_estimates_of_the_bound_are_unbiased(draws):
    """Whichever way times are drawn; the model was to train on `fixed` numbers of masks."""
    H = get_sampler_hparams(
        [*FLAGS, "absorbing", "--total_steps", str(BOUND_STEPS), "--mask_schedule", "fixed"]
    )
    toy = Toy()
    model = AbsorbingDiffusion(H, lambda ids: toy.table[tuple(ids.T)], K, torch.zeros(2, 4))
    ids = torch.tensor([BOUND_GRID]).expand(40_000, -1)
    nats = model.nats(ids, draws, torch.Generator().manual_seed(draws), batch_size=50_000)
    exact, error = variational_bound(toy, BOUND_GRID, BOUND_STEPS), nats.std() / len(ids) ** 0.5
    assert abs(nats.mean() - exact) < 3.5 * error and error < 0.01 * exact
    again = model.nats(ids[:9], draws, torch.Generator().manual_seed(1), batch_size=50_000)
    parts = model.nats(ids[:9], draws, torch.Generator().manual_seed(1), batch_size=2)
    assert torch.equal(again, parts)


def test_likelihood_of_the_autoregressive_prior_is_exact():
    """Over all sequences of a tiny model its probabilities add up to 1."""
    torch.manual_seed(0)
    H = get_sampler_hparams(
        f"{ON_DIGITS} --ae_load_dir none --ae_load_step 1 --img_size 16 --ch_mult 1 1 1 1 "
        "--attn_resolutions 2 --codebook_size 3 --bert_n_emb 32 --bert_n_head 4 "
        "--bert_n_layers 2 --disc_layers 1 --sampler autoregressive".split()
    )
    model = AutoregressiveTransformer(H, torch.zeros(3, 4)).eval()
    model.net.head.weight.data.normal_()  # far from uniform
    ids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    nats = model.nats(ids, batch_size=10)
    assert nats.dtype == torch.float64 and nats.std() > 0.1
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)


HISTORIES = ("Lt_count", "Lt_history", "loss_history")


def test_histories_average_with_decay():
    """Step by step, however many steps are averaged in together; a bad step leaves no trace."""
    H = get_sampler_hparams([*FLAGS, "absorbing"])
    together, alone = (AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4)) for _ in "ab")
    for t, loss, elbo, bad in (
        ([3, 3, 5], [1.0, 3.0, 7.0], [2.0, 2.0, 3.0], False),
        ([3, 4, 9], [float("nan")] * 3, [float("inf")] * 3, True), ([3], [12.0], [4.0], False),
    ):
        for model in (together, alone):
            model.record_losses(torch.tensor(t), torch.tensor(loss), torch.tensor(elbo))
            model.end_step(torch.tensor(bad))
        alone.update_histories()
    assert not together.Lt_count.any()
    together.update_histories()
    assert together.loss_history[3] == pytest.approx(0.9 * 2 + 0.1 * 12)
    assert together.Lt_history[3] == pytest.approx(0.9 * 4 + 0.1 * 16)
    assert together.loss_history[5] == 7 and together.Lt_history[5] == 9
    assert together.Lt_count.tolist() == [0, 0, 0, 3, 0, 1, *[0] * 11]
    for name in HISTORIES:
        assert torch.equal(getattr(together, name), getattr(alone, name))


@pytest.mark.parametrize("flags", [
    "--t_sampling low_discrepancy", "--t_sampling uniform --mask_schedule fixed"
])
@pytest.mark.parametrize("processes", [1, 3])
def test_parts_of_a_batch_train_as_the_whole(processes, flags):
    """The mean of the parts' losses, and the same histories: whether one process computes all parts
    or each one, whose sums are added up. There are fewer times than ids, and so some twice."""
    torch.manual_seed(0)
    flags = f"{flags} --embd_pdrop 0 --resid_pdrop 0 --total_steps 4"
    H = get_sampler_hparams([*FLAGS, "absorbing", *flags.split()])
    whole = AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4))
    models, sums = [copy.deepcopy(whole) for _ in range(processes)], []
    for step in range(3):
        ids, losses = torch.randint(12, (6, 64)), []
        for index in range(3):
            rng = torch.Generator().manual_seed(step)
            losses.append(models[index % processes](ids.chunk(3)[index], rng, part=(index, 3)))
        stats = whole(ids, torch.Generator().manual_seed(step))
        for name in ("loss", "bits_per_token"):
            assert_close(torch.stack([loss[name] for loss in losses]).mean(), stats[name])
        for model in (whole, *models):
            model.end_step(torch.tensor(False))
    for model in copy.deepcopy(models):
        model.update_histories(lambda steps: sums.append(steps.clone()))
    for model in models:
        model.update_histories(lambda steps: steps.copy_(sum(sums)))
    whole.update_histories()
    assert whole.Lt_count.sum() == 18 and whole.Lt_count.max() > 3
    for model in models:
        for name in HISTORIES:
            assert_close(getattr(model, name), getattr(whole, name))


def test_the_autoregressive_prior_ignores_noise_and_parts():
    H = get_sampler_hparams([*FLAGS, "autoregressive"])
    model = AutoregressiveTransformer(H, torch.zeros(12, 4)).eval()
    ids, noise = torch.randint(12, (2, 64)), torch.Generator().manual_seed(1)
    before = noise.get_state()
    loss = model(ids, rng=noise, part=(1, 2))["loss"]
    assert loss == model(ids)["loss"] and torch.equal(noise.get_state(), before)


@pytest.mark.parametrize("kind", ["absorbing", "autoregressive"])
def test_the_codebook_is_shared_and_not_saved(kind):
    H = get_sampler_hparams([*FLAGS, kind])
    codebook = torch.nn.Parameter(torch.zeros(12, 4))
    if kind == "absorbing":
        model = AbsorbingDiffusion(H, Transformer(H), 12, codebook)
    else:
        model = AutoregressiveTransformer(H, codebook)
    assert model.embedding_weight.data_ptr() == codebook.data_ptr()
    assert not model.embedding_weight.requires_grad
    assert "embedding_weight" not in model.state_dict()


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
    fast = model.sample(3, rng=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    slow = torch.empty(3, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(64):
            token = draw(model.net(slow)[:, -1], 1.0, generator)
            slow = torch.cat((slow, token[:, None]), dim=1)
    assert torch.equal(fast, slow)


def test_embed_lays_vectors_out_row_by_row():
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
    assert net.grid == (8, 8) and net.pos_emb is None
    for block in net.blocks:
        assert (block.attn.rpb is not None, block.attn.rope) == (
            "rpb" in position, "rope" in position
        )
    for side in (8, 16):
        assert net(torch.zeros(2, side**2, dtype=torch.long), grid=(side, side)).isfinite().all()
    ids = torch.randint(13, (1, 20, 20))
    logits = net(ids.flatten(1), grid=(20, 20)).view(20, 20, 12)
    moved = net(ids.roll((3, 2), dims=(1, 2)).flatten(1), grid=(20, 20)).view(20, 20, 12)
    inner = slice(7, -5)  # two blocks that each reach 2 tokens, and what the roll brought round
    assert torch.allclose(moved[inner, inner], logits.roll((3, 2), dims=(0, 1))[inner, inner])
    corner = moved[:3, :3] - logits.roll((3, 2), dims=(0, 1))[:3, :3]
    assert corner.abs().max() > 1e-6


def test_absolute_positions_refuse_another_grid():
    H = get_sampler_hparams([*FLAGS, "absorbing"])
    with pytest.raises(ValueError, match="absolute positions"):
        Transformer(H)(torch.zeros(1, 140, dtype=torch.long), grid=(10, 14))


def test_top_k_1_and_a_small_top_p_draw_the_likeliest_id():
    """With top_k 1, or top_p near 0, every token is the likeliest after those before it."""
    for flag, value in (("--top_k", "1"), ("--top_p", "0.001")):
        H = get_sampler_hparams([*FLAGS, "autoregressive", flag, value])
        model = AutoregressiveTransformer(H, torch.zeros(12, 4)).eval()
        ids = model.sample(3, temp=3.0)
        with torch.no_grad():
            assert torch.equal(ids, model.net(ids[:, :-1]).argmax(-1))


def test_the_nucleus_is_that_of_the_tempered_distribution():
    """At temperature 2 the likeliest token has 0.44 rather than 0.64: top_p 0.5 keeps another."""
    logits = torch.tensor([0.64, 0.17, 0.15, 0.04]).log()
    ids = sample_autoregressive(lambda ids: logits.expand(500, -1), 500, 1, 2.0, top_p=0.5)
    assert sorted(ids.unique().tolist()) == [0, 1]
