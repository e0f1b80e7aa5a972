"""The baseline prior: a causal transformer that predicts ids one by one, in raster order."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.prior.transformer import Transformer
from models.sampling.samplers import sample_autoregressive


class AutoregressiveTransformer(nn.Module):
    """Causal transformer over grids of ids [B, N] with codebook `embedding_weight` [K, emb_dim]."""

    def __init__(self, H, embedding_weight):
        super().__init__()
        self.shape = tuple(H.latent_shape[1:])
        self.tokens = math.prod(self.shape)
        self.register_buffer("embedding_weight", embedding_weight.detach(), persistent=False)
        self.net = Transformer(H)
        self.top_k, self.top_p = H.top_k, H.top_p

    @property
    def transformer(self):
        """The causal transformer."""
        return self.net

    def bits(self, ids):
        """-log2 p of every token, [B, N]."""
        logits = self.net(ids[:, :-1])  # [B, N, K]
        nats = F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")
        return nats / math.log(2)

    def forward(self, ids, rng=None, part=(0, 1)):
        """Training objective for ids [B, N]: `loss` and `bits_per_token`, both the mean of `bits`.

        The other arguments are those of `AbsorbingDiffusion.forward` and are ignored.
        """
        loss = self.bits(ids).mean()
        return {"loss": loss, "bits_per_token": loss.detach()}

    def end_step(self, bad):
        """It has no times, and so no histories of their losses."""

    def update_histories(self, all_reduce=None):
        """See `end_step`."""

    @torch.no_grad()
    def bits_per_token(self, ids):
        """-log2 p(ids) / N of each sample, exact: [B]."""
        return self.bits(ids).mean(1)

    @torch.no_grad()
    def nats(self, ids, draws=0, batch_size=64):
        """-log p(ids) of each sample, in nats and exact: float64 [B]. `draws` is ignored."""
        bits = torch.cat([self.bits(part).double().sum(1) for part in ids.split(batch_size)])
        return bits * math.log(2)

    def sample(self, n_samples, temp=1.0, sample_steps=None, rng=None, progress=None):
        """Draw ids [n_samples, N], caching keys and values. `sample_steps` is ignored; `progress`
        is that of `models.sampling.samplers`."""
        caches = [{} for _ in self.net.blocks]

        def next_logits(ids):
            return self.net(ids, caches=caches)[:, -1]

        return sample_autoregressive(
            next_logits, n_samples, self.tokens, temp, rng, self.net.start_tok.device,
            self.top_k, self.top_p, progress,
        )
