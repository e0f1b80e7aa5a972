"""Draw grids of ids from a denoiser: pure mathematics over `denoise(ids [B, N]) -> logits`.

Every sampler starts from all-masked ids and calls `progress(done, total)` after each network
call. Shapes: B batch, N tokens, K codebook size, S sample steps.
"""

import torch


def draw(logits, temp=1.0, generator=None):
    """One categorical draw from each row of logits [M, K] at temperature `temp`: int64 [M].

    Drawn in float64: the inverse-CDF and Gumbel noise of lower precisions cut the tails off,
    which lowers the temperature (arXiv 2409.02908).
    """
    probabilities = (logits.double() / temp).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def sample_ancestral(
    denoise, n_samples, tokens, mask_id, sample_steps, temp=1.0, generator=None, device=None,
    progress=None,
):
    """Ancestral sampling of the absorbing diffusion, event by event: ids int64 [B, N].

    Step by step, for t = S..1 every masked token is unmasked with probability 1/t. The denoiser
    is not told t, so the same distribution arises when every token draws its time uniformly from
    1..S and the network runs only at times that occur. Each sample keeps its own clock: one
    network call serves the next event of every unfinished sample, whatever their times are.
    """
    ids = torch.full((n_samples, tokens), mask_id, dtype=torch.long, device=device)
    time = torch.randint(sample_steps, (n_samples, tokens), generator=generator, device=device)
    # event[b, i]: how many later times occur in sample b before token i is unmasked
    order = time.sort(dim=1, descending=True)
    new_event = torch.ones_like(time)
    new_event[:, 0] = 0
    new_event[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    event = torch.empty_like(time).scatter_(1, order.indices, new_event.cumsum(1))
    last_event = event.amax(1)
    calls = int(last_event.max()) + 1
    for call in range(calls):
        running = (last_event >= call).nonzero().squeeze(1)
        logits = denoise(ids[running])  # [unfinished, N, K]
        now = event[running] == call
        rows, columns = now.nonzero(as_tuple=True)
        ids[running[rows], columns] = draw(logits[rows, columns], temp, generator)
        if progress:
            progress(call + 1, calls)
    return ids


@torch.no_grad()
def sample_mask_predict(
    denoise, n_samples, tokens, mask_id, total_steps, sample_steps, temp=1.0, generator=None,
    device=None, progress=None,
):
    """Mask-predict with random re-masking (the published `mlm` sampling): ids int64 [B, N].

    At S times from `total_steps` down to 1, every token is masked again with probability
    t / total_steps and all masked tokens are drawn at once.
    """
    ids = torch.full((n_samples, tokens), mask_id, dtype=torch.long, device=device)
    times = torch.linspace(total_steps, 1, sample_steps).long().tolist()
    for call, t in enumerate(times):
        coin = torch.rand(ids.shape, generator=generator, device=device)
        masked = (coin < t / total_steps) | (ids == mask_id)
        logits = denoise(ids.masked_fill(masked, mask_id))
        ids[masked] = draw(logits[masked], temp, generator)
        if progress:
            progress(call + 1, len(times))
    return ids


@torch.no_grad()
def sample_autoregressive(
    next_logits, n_samples, tokens, temp=1.0, generator=None, device=None, progress=None
):
    """Draw ids one by one, in raster order: int64 [B, N].

    `next_logits(ids [B, i])` gives the logits [B, K] of token i.
    """
    ids = torch.empty((n_samples, 0), dtype=torch.long, device=device)
    for index in range(tokens):
        token = draw(next_logits(ids), temp, generator)
        ids = torch.cat((ids, token[:, None]), dim=1)
        if progress:
            progress(index + 1, tokens)
    return ids
