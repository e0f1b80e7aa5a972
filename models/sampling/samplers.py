"""Sampling methods: how grids of ids are drawn from a denoiser.

A denoiser is any `denoise(ids [B, N], where bool [B, N]) -> logits [M, K]`: of the M positions that
`where` asks for, row by row, and of no others. A sampling method starts from ids [B, N] that hold
`mask_id` where a token is to be drawn and known tokens elsewhere, which it keeps, and calls
`progress(done, total, ids)` after each network call; `ids` [B, N] are those so far, which must not
be written to. Only `remdm` and `mlm` change drawn tokens. `rng` is where random numbers come from:
see `models.sampling.noise`.

What is drawn when is planned on the CPU, so that a call waits for a GPU at most once.

To add a method, write a function with the arguments of the others, decorate it with
`@sampling_method`, its name and the names of its options, and add its name to the choices of
`sample_type` and its options to the settings in `SamplingMethod` of hparams/groups.py.

Shapes: B batch, N tokens, K codebook size, S steps.
"""

import functools
import math
from typing import Callable, NamedTuple

import numpy as np
import torch

from models.devices import to_device, to_host
from models.sampling.noise import exponential, noise, uniform


class SamplingMethod(NamedTuple):
    sample: Callable
    options: tuple[str, ...]  # names of keyword arguments: `grid` (h, w), or settings


SAMPLERS = {}  # name (the setting `sample_type`) to SamplingMethod


def sampling_method(name, *options):
    """Decorator that adds a function to SAMPLERS and runs it without gradients."""
    def add(function):
        SAMPLERS[name] = SamplingMethod(torch.no_grad()(function), options)
        return SAMPLERS[name].sample

    return add


def draw(logits, temp=1.0, rng=None, rows=None):
    """One categorical draw from each row of logits [M, K] at temperature `temp`: int64 [M].

    `rows` says which sample each row belongs to where `rng` are several (see `rows_of_noise`).
    Raises RuntimeError, on a GPU later, where a row is not finite.
    """
    # Lower precisions cut the tails off, which lowers the temperature (2409.02908).
    probabilities = (logits.double() / temp).softmax(-1)
    torch._assert_async(  # a row that is not finite is NaN throughout
        probabilities[:, 0].isfinite().all(), "logits to draw ids from are not finite"
    )
    # As torch.multinomial draws one, without its two waits: p / q is largest with probability p.
    return probabilities.detach().div_(exponential(probabilities, rng, rows)).argmax(-1)


def truncate(logits, top_k=0, top_p=1.0):
    """Logits [M, K] with all but the likeliest tokens at -inf: the `top_k` (0: all) likeliest, and
    of those the fewest whose probabilities add up to `top_p` (nucleus, arXiv 1904.09751)."""
    if top_k and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def fill(denoise, ids, where, temp, rng):
    """Draw the tokens `where`, an array bool [B, N], of ids [B, N] in place, in one network call at
    most: the network sees only samples with a token to draw."""
    running = np.flatnonzero(where.any(1))
    if len(running):
        rows, columns = where.nonzero()
        at = to_device(rows, ids.device), to_device(columns, ids.device)
        seen, asked = to_device(running, ids.device), to_device(where[running], ids.device)
        ids[at] = draw(denoise(ids[seen], asked), temp, rng, rows)


def reveal(denoise, ids, mask_id, call, temp, rng, progress):
    """Draw each masked token of ids [B, N] at the network call numbered `call` [B, N], from 0."""
    call, ids = to_host(call.masked_fill(ids != mask_id, -1)), ids.clone()
    calls = int(call.max()) + 1
    for number in range(calls):
        fill(denoise, ids, call == number, temp, rng)
        if progress:
            progress(number + 1, calls, ids)
    return ids


def rank(keys, masked):
    """Number of each masked token when `keys` [B, N] of its row ascend: int64 [B, N], from 0."""
    return keys.masked_fill(~masked, float("inf")).argsort(dim=1).argsort(dim=1)


def reveal_in_order(denoise, ids, mask_id, steps, keys, *arguments):
    """Draw the masked tokens as `keys` [B, N] ascend, spread evenly over S calls, or one a call."""
    masked = ids == mask_id
    count = masked.sum(1, keepdim=True)
    call = rank(keys, masked) * count.clamp(max=steps) // count.clamp(min=1)
    return reveal(denoise, ids, mask_id, call, *arguments)


@sampling_method("diffusion")
def sample_ancestral(denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None):
    """Ancestral sampling of the absorbing diffusion, event by event.

    Step by step, for t = S..1 every masked token is unmasked with probability 1/t. The denoiser
    does not see t, so the distribution is the same when every token draws its time uniformly from
    1..S and the network runs only at times that occur, each sample with its own clock.
    """
    time = noise(functools.partial(torch.randint, steps), ids.shape, rng, device=ids.device)
    time = time.masked_fill(ids != mask_id, -1)
    # call[b, i]: how many times later than its own occur in sample b
    ordered, order = time.sort(dim=1, descending=True)
    later = ordered.diff(dim=1, prepend=ordered[:, :1]).ne(0).cumsum(1)
    call = torch.empty_like(time).scatter_(1, order, later)
    return reveal(denoise, ids, mask_id, call, temp, rng, progress)


@sampling_method("first_hitting")
def sample_first_hitting(denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None):
    """The continuous-time limit of ancestral sampling (Zheng et al., arXiv 2409.02908).

    In that limit no two tokens are unmasked at once and their order is uniformly random. With at
    least as many steps as tokens this is exact, one token a call; with fewer, a call draws several.
    """
    keys = noise(torch.rand, ids.shape, rng, device=ids.device, dtype=torch.float64)
    return reveal_in_order(denoise, ids, mask_id, steps, keys, temp, rng, progress)


@sampling_method("raster")
def sample_raster(denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None):
    """Row by row, spread evenly over S calls: one token a call with as many steps as tokens."""
    place = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float64).expand(ids.shape)
    return reveal_in_order(denoise, ids, mask_id, steps, place, temp, rng, progress)


def cosine_schedule(tokens, steps):
    """How many of `tokens` [B] are still masked after each call: int64 [B, S], as in MaskGIT, but
    every call unmasks at least one token."""
    calls, tokens = torch.arange(1, steps + 1, device=tokens.device), tokens[:, None]
    left = (tokens * torch.cos(math.pi / 2 * (calls.double() / steps)) + 1e-9).floor().long()
    return torch.minimum(left, tokens - calls).clamp(min=0)


def radical_inverse(index, base):
    """The van der Corput sequence at `index` (int64): float64 in [0, 1)."""
    value, scale = torch.zeros_like(index, dtype=torch.float64), 1.0
    while index.any():
        scale /= base
        value += scale * (index % base)
        index = index // base
    return value


def halton_order(height, width):
    """Positions of a grid in the order in which a Halton sequence (bases 2, 3) first meets them:
    int64 [H*W]. Early ones lie far apart (Besnier et al., arXiv 2503.17076)."""
    points, first = 4 * height * width, []
    while len(first) < height * width:
        index = torch.arange(1, points + 1)
        cell = (radical_inverse(index, 2) * height).long() * width
        cell += (radical_inverse(index, 3) * width).long()
        first = np.unique(cell.numpy(), return_index=True)[1]
        points *= 4
    return cell[np.sort(first)]


@functools.lru_cache(maxsize=8)
def halton_places(height, width):
    """The place of each position of a grid in its `halton_order`: an array int64 [H*W]."""
    return halton_order(height, width).argsort().numpy()


@sampling_method("halton", "grid")
def sample_halton(denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None, *, grid):
    """Tokens of a call lie far apart on `grid` (h, w): their order is a Halton sequence (Besnier
    et al., arXiv 2503.17076), shifted at random for each sample; cosine schedule."""
    height, width = grid
    masked = ids == mask_id
    place = to_device(halton_places(height, width), ids.device)
    shift = noise(torch.rand, (2, len(ids), 1, 1), rng, 1, device=ids.device)
    rows = torch.arange(height, device=ids.device)[:, None] + (shift[0] * height).long()
    columns = torch.arange(width, device=ids.device) + (shift[1] * width).long()
    place = place[(rows % height * width + columns % width).flatten(1)]  # [B, N]
    left = cosine_schedule(masked.sum(1), steps)  # [B, S]
    unmasked_before = masked.sum(1, keepdim=True) - left
    # token number r of a sample is drawn at the first call after which more than r are unmasked
    call = torch.searchsorted(unmasked_before, rank(place.double(), masked), right=True)
    return reveal(denoise, ids, mask_id, call, temp, rng, progress)


@sampling_method("confidence", "choice_temp")
def sample_confidence(
    denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None, *, choice_temp=4.5
):
    """MaskGIT (Chang et al., arXiv 2202.04200): each of S calls draws every masked token and keeps
    those with the highest confidence; cosine schedule.

    Confidence is the drawn token's log probability plus Gumbel noise, whose scale falls linearly
    from `choice_temp` to 0.
    """
    ids = ids.clone()
    left = cosine_schedule((ids == mask_id).sum(1), steps)
    for number in range(steps):
        masked = ids == mask_id
        where = to_host(masked)
        running = np.flatnonzero(where.any(1))
        if len(running) == 0:
            break
        rows, columns = where.nonzero()
        at = to_device(rows, ids.device), to_device(columns, ids.device)
        seen = to_device(running, ids.device)
        logits = denoise(ids[seen], masked[seen]).double()
        tokens = draw(logits, temp, rng, rows)
        confidence = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)  # [M]
        coins = uniform(len(tokens), rng, rows, ids.device)
        gumbel = -(-coins.clamp(min=1e-300).log()).log()
        confidence = confidence + choice_temp * (1 - (number + 1) / steps) * gumbel
        keys = torch.zeros(masked.shape, dtype=torch.float64, device=ids.device)
        keys[at] = -confidence
        kept = masked & (rank(keys, masked) < (masked.sum(1) - left[:, number])[:, None])
        drawn = ids.clone()
        drawn[at] = tokens
        ids = torch.where(kept, drawn, ids)
        if progress:
            progress(number + 1, steps, ids)
    return ids


@sampling_method("remdm", "remask")
def sample_remdm(denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None, *, remask=0.05):
    """Ancestral sampling that masks tokens again (ReMDM, Wang et al., arXiv 2503.00307).

    From t to t-1, with a = 1 - t/S the fraction unmasked, a drawn token is masked again with
    probability s = `remask` * min(1, (1 - a') / a) (the paper's `rescale`, a' that of t-1), and a
    masked one is drawn with probability (a' - (1 - s) a) / (1 - a), which keeps the fractions.
    With `remask` 0 this is ancestral sampling, step by step.
    """
    ids = ids.clone()
    unknown = ids == mask_id
    for number, t in enumerate(range(steps, 0, -1)):
        before, after = 1 - t / steps, 1 - (t - 1) / steps
        again = remask * min(1.0, (1 - after) / before) if before else 0.0
        drawn = (after - (1 - again) * before) / (1 - before)
        masked = ids == mask_id
        coin = noise(torch.rand, ids.shape, rng, device=ids.device, dtype=torch.float64)
        fill(denoise, ids, to_host(masked & (coin < drawn)), temp, rng)
        ids.masked_fill_(unknown & ~masked & (coin < again), mask_id)
        if progress:
            progress(number + 1, steps, ids)
    return ids


@functools.lru_cache(maxsize=8)
def times_from(total_steps, steps):
    """`steps` times from `total_steps` down to 1, evenly spread."""
    return torch.linspace(total_steps, 1, steps).long().tolist()


@sampling_method("mlm", "total_steps")
def sample_mask_predict(
    denoise, ids, mask_id, steps, temp=1.0, rng=None, progress=None, *, total_steps
):
    """Mask-predict with random re-masking, the published `mlm` sampling.

    At S times from T = `total_steps` down to 1, every token is masked again with probability t/T
    and all masked tokens are drawn at once.
    """
    ids = ids.clone()
    unknown = ids == mask_id
    times = times_from(total_steps, steps)
    for number, t in enumerate(times):
        coin = noise(torch.rand, ids.shape, rng, device=ids.device)
        masked = unknown & ((coin < t / total_steps) | (ids == mask_id))
        ids.masked_fill_(masked, mask_id)
        fill(denoise, ids, to_host(masked), temp, rng)
        if progress:
            progress(number + 1, len(times), ids)
    return ids


@torch.no_grad()
def sample_autoregressive(
    next_logits, n_samples, tokens, temp=1.0, rng=None, device=None, top_k=0, top_p=1.0,
    progress=None,
):
    """Draw ids one by one, in raster order: int64 [B, N].

    `next_logits(ids [B, i])` gives the logits [B, K] of token i, which `truncate` may narrow. After
    each call `progress(i, N, ids [B, i])` is called.
    """
    ids = torch.empty((n_samples, 0), dtype=torch.long, device=device)
    for number in range(tokens):
        logits = next_logits(ids).double() / temp  # the nucleus is that of what is drawn from
        token = draw(truncate(logits, top_k, top_p), 1.0, rng)
        ids = torch.cat((ids, token[:, None]), dim=1)
        if progress:
            progress(number + 1, tokens, ids)
    return ids
