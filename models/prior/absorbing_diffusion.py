"""Absorbing diffusion over grids of ids (Unleashing Transformers, 2111.12701; D3PM, 2107.03006).

Shapes: B batch, N tokens, K codebook size; T = total_steps; t int64 [B] in 1..T.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.autoencoder.quantizers import embed_grid
from models.sampling.samplers import SAMPLERS


def draw_times(batch, total_steps, low_discrepancy=False, rng=None, device=None):
    """Times t [B], each uniform on 1..T.

    With `low_discrepancy` the batch shares one draw and covers 1..T evenly (Kingma et al.,
    Variational Diffusion Models, arXiv 2107.00630, appendix I), which lowers the loss's variance.
    """
    if not low_discrepancy:
        return torch.randint(1, total_steps + 1, (batch,), generator=rng, device=device)
    start = torch.rand((), dtype=torch.float64, generator=rng, device=device)
    spread = torch.arange(batch, dtype=torch.float64, device=device) / batch
    return ((start + spread) % 1 * total_steps).long() + 1


def draw_mask(t, tokens, total_steps, schedule="random", rng=None):
    """Which tokens are masked at time t: bool [B, N].

    `random`: each with probability t/T. `fixed`: exactly round(t/T * N) of them, at least one.
    """
    noise = torch.rand((len(t), tokens), generator=rng, device=t.device)
    if schedule == "random":
        return noise < (t / total_steps)[:, None]
    count = (t / total_steps * tokens).round().long().clamp(min=1)
    return noise.argsort(dim=1).argsort(dim=1) < count[:, None]


def diffusion_losses(logits, ids, mask, t, total_steps):
    """The three objectives of each sample, a dict of float32 [B].

    With CE = sum over masked tokens of -log softmax(logits)[id]:
    `elbo` = CE / t * T / (N ln 2), bits per token, the bound's term at t times T;
    `reweighted_elbo` = (1 - t/T) CE / (N ln 2); `mlm` = CE / number masked (0 where none is).
    """
    # Of all tokens, although only the masked ones count: to pick them, a GPU is waited for.
    ce = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
    ce = ce.view_as(ids).masked_fill(~mask, 0.0).sum(1)
    tokens = ids.shape[1]
    nats_to_bits_per_token = 1 / (tokens * math.log(2))
    return {
        "elbo": ce / t * total_steps * nats_to_bits_per_token,
        "reweighted_elbo": (1 - t / total_steps) * ce * nats_to_bits_per_token,
        "mlm": ce / mask.sum(1).clamp(min=1),
    }


class AbsorbingDiffusion(nn.Module):
    """The sampler around a denoiser `denoise_fn` that maps ids [B, N] to logits [B, N, K].

    `mask_id` is the id of the absorbing state, K; `embedding_weight` [K, emb_dim] is the codebook,
    which is neither copied nor saved. The running averages of each time's losses (`loss_history`
    of the objective, `Lt_history` of the squared bound; decay 0.9) and the number of visits
    `Lt_count` are buffers [T+1], saved with the weights. In training, forward passes record losses,
    `end_step` makes a step of them, and `update_histories` averages the steps into the histories,
    before these are read.
    """

    def __init__(self, H, denoise_fn, mask_id, embedding_weight):
        super().__init__()
        self.mask_id = mask_id
        self.shape = tuple(H.latent_shape[1:])
        self.tokens = math.prod(self.shape)
        self.total_steps, self.loss_type = H.total_steps, H.loss_type
        self.mask_schedule = H.mask_schedule
        self.low_discrepancy = H.t_sampling == "low_discrepancy"
        self.sample_type, self.sample_steps = H.sample_type, H.sample_steps
        self.options = {
            name: getattr(H, name)
            for method in SAMPLERS.values() for name in method.options if name != "grid"
        }
        for name in ("Lt_history", "Lt_count", "loss_history"):
            self.register_buffer(name, torch.zeros(H.total_steps + 1))
        self.step_sums = None  # sums of losses of this step
        self.pending_sums = []  # those of earlier steps, which are not in the histories yet
        self.register_buffer("embedding_weight", embedding_weight.detach(), persistent=False)
        self._denoise_fn = denoise_fn

    @property
    def transformer(self):
        """The denoiser."""
        return self._denoise_fn

    def embed(self, ids, grid=None):
        """Codebook vectors of ids [B, N] as the generator's input [B, emb_dim, h, w]."""
        return embed_grid(self.embedding_weight, ids, grid or self.shape)

    def losses(self, ids, t, mask):
        """`diffusion_losses` of ids [B, N], which the denoiser sees masked by `mask` [B, N]."""
        logits = self._denoise_fn(ids.masked_fill(mask, self.mask_id))
        return diffusion_losses(logits, ids, mask, t, self.total_steps)

    def forward(self, ids, rng=None, part=(0, 1)):
        """Training objective for ids [B, N]: a dict with `loss` and `bits_per_token`, means.

        With `part` (r, R) the ids are part r of R of a batch, whose noise is drawn for all parts
        from `rng`. In training mode the losses are recorded for the histories.
        """
        index, parts = part
        t = draw_times(len(ids) * parts, self.total_steps, self.low_discrepancy, rng, ids.device)
        mask = draw_mask(t, ids.shape[1], self.total_steps, self.mask_schedule, rng)
        t, mask = t.chunk(parts)[index], mask.chunk(parts)[index]
        losses = self.losses(ids, t, mask)
        loss = losses[self.loss_type]
        if self.training:
            self.record_losses(t, loss.detach(), losses["elbo"].detach())
        return {"loss": loss.mean(), "bits_per_token": losses["elbo"].detach().mean()}

    @torch.no_grad()
    def record_losses(self, t, loss, elbo):
        """Add losses [B] at times t to the sums of this step: visits, losses, squared bounds."""
        values = torch.stack((torch.ones_like(loss), loss, elbo**2))  # [3, B]
        if self.step_sums is None:
            self.step_sums = values.new_zeros(3, self.total_steps + 1)
        self.step_sums.index_add_(1, t, values)

    @torch.no_grad()
    def end_step(self, bad):
        """The losses recorded since the last call are those of one step of training; where `bad`,
        bool 0-d, is true, they are left out."""
        self.pending_sums.append(self.step_sums.masked_fill_(bad, 0.0))
        self.step_sums = None

    @torch.no_grad()
    def update_histories(self, all_reduce=None):
        """Average the steps since the last call into the histories, one after another: the mean of
        the losses at each time, whose first visit sets its entry.

        `all_reduce` adds a tensor up over several processes in place, as
        `torch.distributed.all_reduce` does: the means are then those of all.
        """
        if not self.pending_sums:
            return
        steps, self.pending_sums = torch.stack(self.pending_sums), []  # [n, 3, T+1]
        if all_reduce is not None:
            all_reduce(steps)
        histories = torch.stack((self.loss_history, self.Lt_history))
        for visits, *totals in steps:
            means = torch.stack(totals) / visits.clamp(min=1)
            decay = torch.where(self.Lt_count > 0, 0.9, 0.0)
            averages = decay * histories + (1 - decay) * means
            histories = torch.where(visits > 0, averages, histories)
            self.Lt_count += visits
        self.loss_history.copy_(histories[0])
        self.Lt_history.copy_(histories[1])

    @torch.no_grad()
    def bits_per_token(self, ids):
        """Estimate of the bound on -log2 p(ids) / N of each sample [B], from one t each, spread
        evenly over 1..T. The bound is that of the `random` schedule (see `nats`)."""
        t = draw_times(len(ids), self.total_steps, True, device=ids.device)
        mask = draw_mask(t, ids.shape[1], self.total_steps)
        return self.losses(ids, t, mask)["elbo"]

    @torch.no_grad()
    def nats(self, ids, draws=0, rng=None, batch_size=64):
        """Unbiased estimate of the bound on -log p(ids) of each sample, in nats: float64 [B].

        The bound is the sum over t = 1..T of E[CE_t] / t. Every t is visited once; with `draws` n,
        only n times, spread evenly over 1..T from a random start and weighted T/n. Masks follow the
        `random` schedule, as the weight 1/t holds for independently masked tokens only.
        """
        samples, tokens = ids.shape
        if draws:
            times = [draw_times(draws, self.total_steps, True, rng, ids.device) for _ in ids]
            t = torch.cat(times)  # [B * n]
        else:
            t = torch.arange(1, self.total_steps + 1, device=ids.device).repeat(samples)
        rows = ids.repeat_interleave(len(t) // samples, dim=0)  # [B * n, N]
        mask = draw_mask(t, tokens, self.total_steps, rng=rng)
        batches = zip(*(tensor.split(batch_size) for tensor in (rows, t, mask)))
        bits = torch.cat([self.losses(*batch)["elbo"] for batch in batches])
        return bits.view(samples, -1).double().mean(1) * tokens * math.log(2)

    def sample(
        self, n_samples, temp=1.0, sample_steps=None, sample_type=None, rng=None, progress=None,
        known=None, grid=None, denoise=None,
    ):
        """Draw ids [n_samples, N]; steps and type default to the model's settings.

        `known` ids [n_samples, N] are kept where they are not `mask_id`. `grid` (h, w) is another
        one than the model's; `denoise` (see `models.sampling.samplers`) replaces the network, as it
        must there if positions are absolute. Raises ValueError for `known` of another shape.
        """
        method = SAMPLERS[sample_type or self.sample_type]
        grid = grid or self.shape
        shape, device = (n_samples, math.prod(grid)), self.Lt_count.device
        ids = torch.full(shape, self.mask_id, device=device) if known is None else known
        if ids.shape != shape:
            raise ValueError(f"`known` must be {shape}, not {tuple(ids.shape)}")
        options = {**self.options, "grid": grid}
        return method.sample(
            denoise or (lambda ids, where: self._denoise_fn(ids, grid=grid, where=where)),
            ids, self.mask_id, sample_steps or self.sample_steps, temp, rng, progress,
            **{name: options[name] for name in method.options},
        )
