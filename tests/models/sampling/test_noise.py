"""Chunks of samples that are drawn together get the ids that each gets alone."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import SAMPLERS
from models.sampling import samplers
from models.sampling.noise import Streams, noise, uniform
from models.sampling.samplers import draw, sample_autoregressive

TOKENS, K, GRID = 24, 7, (4, 6)
COUNTS = (3, 1, 4, 2)  # samples of each chunk
TABLE = torch.randn(K + 1, TOKENS, K, generator=torch.Generator().manual_seed(0))
OPTIONS = {"mlm": dict(total_steps=16), "halton": dict(grid=GRID), "remdm": dict(remask=0.3)}


def denoise(ids, where):
    """Logits that depend on the sample's ids at, and left of, a position, to the bit alike in any
    batch."""
    own = TABLE[ids, torch.arange(ids.shape[1])]
    return (own + own.roll(1, dims=1) * 1.5)[where]


def start():
    """Masked ids of all chunks: some have known tokens, one chunk has nothing to draw."""
    ids = torch.full((sum(COUNTS), TOKENS), K)
    ids[1, :9], ids[3], ids[8, 5:] = 2, 3, 1
    return ids


def streams():
    return Streams([torch.Generator().manual_seed(i) for i in range(len(COUNTS))], COUNTS)


@pytest.mark.parametrize("steps", [5, 24, 60])
@pytest.mark.parametrize("name", SAMPLERS)
def test_chunks_drawn_together_have_the_ids_of_each_alone(name, steps):
    def sample(ids, rng=None):
        options = OPTIONS.get(name, {})
        return SAMPLERS[name].sample(denoise, ids, K, steps, 0.9, rng, **options)

    alone = []
    for seed, ids in enumerate(start().split(COUNTS)):
        torch.manual_seed(seed)  # torch's own generator
        alone.append(sample(ids))
    global_state = torch.get_rng_state()
    together = sample(start(), streams())
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert len(together.unique(dim=0)) > 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chunk_leaves_its_generator_where_it_is_left_alone(name):
    """No draw is made for a chunk that alone would not make it."""
    rng = streams()
    SAMPLERS[name].sample(denoise, start(), K, 30, 1.0, rng, **OPTIONS.get(name, {}))
    for seed, ids in enumerate(start().split(COUNTS)):
        own = torch.Generator().manual_seed(seed)
        SAMPLERS[name].sample(denoise, ids, K, 30, 1.0, own, **OPTIONS.get(name, {}))
        assert torch.equal(own.get_state(), rng.generators[seed].get_state())


def test_autoregressive_chunks_drawn_together_have_the_ids_of_each_alone():
    def next_logits(ids):
        if not ids.shape[1]:
            return TABLE[K, 0].expand(len(ids), -1)
        return TABLE[ids[:, -1], ids.shape[1]]

    def sample(n, rng=None):
        return sample_autoregressive(next_logits, n, TOKENS, 0.8, rng, top_k=5, top_p=0.9)

    alone = []
    for seed, count in enumerate(COUNTS):
        torch.manual_seed(seed)
        alone.append(sample(count))
    assert torch.equal(sample(sum(COUNTS), streams()), torch.cat(alone))


def test_a_draw_is_that_of_multinomial():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(1)).half() * 3
    for temp in (0.7, 1.0):
        expected = torch.multinomial(
            (logits.double() / temp).softmax(-1), 1, generator=torch.Generator().manual_seed(2)
        )
        drawn = draw(logits, temp, torch.Generator().manual_seed(2))
        assert torch.equal(drawn, expected.squeeze(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    with pytest.raises(RuntimeError, match="not finite"):
        draw(logits)


def test_streams_refuse_another_number_of_samples():
    with pytest.raises(ValueError, match="serve 10 samples, not 9"):
        noise(torch.rand, (9, 2), streams())
    rows = np.array([0, 0, 4, 8])  # of chunks 0, 0, 2, 3
    drawn = uniform(4, streams(), rows, torch.device("cpu"))
    expected = [torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                for n, seed in ((2, 0), (1, 2), (1, 3))]
    assert torch.equal(drawn, torch.cat(expected))


@pytest.mark.parametrize("name", SAMPLERS)
def test_methods_mix_no_devices_and_wait_once_a_call(name, monkeypatch):
    """On fake CUDA tensors: only what `to_host` gives has values, here those of a run on the CPU,
    and any other look at a value would be an error."""
    values, calls = [], []

    def record(tensor):
        values.append(tensor.numpy().copy())
        return values[-1]

    def on_cpu(ids, where):
        calls.append(int(where.sum()))
        return denoise(ids, where)

    monkeypatch.setattr(samplers, "to_host", record)
    options = OPTIONS.get(name, {})
    rng = torch.Generator().manual_seed(0)
    SAMPLERS[name].sample(on_cpu, start(), K, 12, 1.0, rng, **options)
    assert len(calls) > 3 and len(values) <= len(calls) + 2

    def on_gpu(ids, where):
        assert ids.device.type == where.device.type == "cuda"
        return torch.zeros((calls.pop(0), K), device="cuda")

    monkeypatch.setattr(samplers, "to_host", lambda tensor: values.pop(0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.full((sum(COUNTS), TOKENS), K, device="cuda")
        ids = SAMPLERS[name].sample(on_gpu, ids, K, 12, **options)
    assert ids.device.type == "cuda" and not values and not calls


def test_autoregressive_draws_mix_no_devices_and_wait_for_none():
    def next_logits(ids):
        assert ids.device.type == "cuda"
        return torch.zeros((5, K), device="cuda")

    with FakeTensorMode():  # a look at a value would be an error
        ids = sample_autoregressive(next_logits, 5, 6, 0.9, device="cuda", top_k=3, top_p=0.8)
    assert ids.device.type == "cuda" and ids.shape == (5, 6)
