"""Vector quantizers: from an encoder's grid of vectors to codebook ids and back.

Shapes: B images, D = emb_dim, K = codebook_size, h x w grid.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def codebook_usage(indices, codebook_size):
    """How often each id occurs among `indices` of any shape: {"usage": counts [K], "perplexity":
    0-d, the exponential of their entropy in nats, from 1 (one id only) to K (all alike)}."""
    ids = indices.flatten()
    # index_add instead of bincount: no wait for the device, and it works on `meta`.
    usage = ids.new_zeros(codebook_size).index_add_(0, ids, torch.ones_like(ids))
    frequency = usage.float() / ids.numel()
    return {"usage": usage, "perplexity": torch.special.entr(frequency).sum().exp()}


def gumbel_temperature(step):
    """The published temperature at a training step: from 1 to 1/16 in 150,000 steps."""
    return max(1 / 16, 1 - step / 160_000)


def embed_grid(weight, indices, shape):
    """Vectors [B, D, h, w] of ids [B, h*w], by the codebook `weight` [K, D].

    Raises ValueError where the ids do not fill the grid `shape` (h, w).
    """
    height, width = shape
    if indices.ndim != 2 or indices.shape[1] != height * width:
        raise ValueError(
            f"Ids for a {height}x{width} grid must be [B, {height * width}], "
            f"not {list(indices.shape)}"
        )
    vectors = F.embedding(indices, weight)                        # [B, h*w, D]
    return vectors.transpose(1, 2).unflatten(2, (height, width))  # [B, D, h, w]


class NearestQuantizer(nn.Module):
    """Each vector becomes the codebook entry at the smallest squared distance (VQ-VAE).

    `beta` weighs the term that moves the *codebook*, as the published models were trained
    (van den Oord et al., 1711.00937, eq. 3, has it on the other term).
    """

    def __init__(self, codebook_size, emb_dim, beta):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(codebook_size, emb_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, z):
        """z [B, D, h, w] -> (z_q like z, codebook loss (0-d), `codebook_usage`, ids [B, h*w]).

        The gradient of z_q passes straight through to z; the codebook learns from the loss only.
        """
        # Half precision would pick wrong neighbours: vectors lie closer than its rounding.
        with torch.autocast(device_type=z.device.type, enabled=False):
            vectors = z.float().flatten(2).transpose(1, 2)  # [B, h*w, D]
            codebook = self.codebook.float()                # [K, D]
            # |z|^2 is the same for every entry, so argmin does without it.
            scores = codebook.square().sum(1) - 2 * vectors @ codebook.t()  # [B, h*w, K]
            indices = scores.argmin(2)                                      # [B, h*w]
            chosen = F.embedding(indices, codebook)                         # [B, h*w, D]
            loss = F.mse_loss(vectors, chosen.detach())
            loss = loss + self.beta * F.mse_loss(chosen, vectors.detach())
            # z - sg[z] is exactly zero: the generator sees the codebook's entries to the bit, as
            # it will when the sampler draws them, and the gradient is that of the identity.
            quantized = chosen.detach() + (vectors - vectors.detach())
        z_q = quantized.transpose(1, 2).unflatten(2, z.shape[2:]).to(z.dtype)  # [B, D, h, w]
        return z_q, loss, codebook_usage(indices, len(codebook)), indices

    @property
    def codebook(self):
        """The parameter [K, D]."""
        return self.embedding.weight


class GumbelQuantizer(nn.Module):
    """Ids drawn from a learned categorical through the Gumbel-softmax (1611.01144, 1611.00712).

    The training loop sets `temperature` to `gumbel_temperature(step)`. With `straight_through` the
    draw is one-hot forward and soft backward, otherwise soft both ways. In eval mode there is no
    draw: the likeliest id is taken, so that an image has one grid of ids.
    """

    def __init__(self, codebook_size, emb_dim, kl_weight, straight_through=False):
        super().__init__()
        self.kl_weight, self.straight_through = kl_weight, straight_through
        self.temperature = 1.0
        self.proj = nn.Conv2d(emb_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, emb_dim)

    def forward(self, z):
        """Returns what `NearestQuantizer` does. The loss is kl_weight · KL(q || uniform over K ids)
        in nats, summed over ids and averaged over batch and grid."""
        logits = self.proj(z)  # [B, K, h, w]
        with torch.autocast(device_type=z.device.type, enabled=False):
            logits = logits.float()
            log_q = logits.log_softmax(1)
            kl = (log_q.exp() * (log_q + math.log(len(self.codebook)))).sum(1).mean()
            if self.training:
                choice = F.gumbel_softmax(logits, self.temperature, self.straight_through, dim=1)
                indices = choice.argmax(1).flatten(1)  # [B, h*w]
                z_q = torch.einsum("bkhw,kd->bdhw", choice, self.codebook.float())
            else:
                indices = logits.argmax(1).flatten(1)  # [B, h*w]
                z_q = embed_grid(self.codebook, indices, z.shape[2:])
        usage = codebook_usage(indices, len(self.codebook))
        return z_q.to(z.dtype), self.kl_weight * kl, usage, indices

    @property
    def codebook(self):
        """The parameter [K, D]."""
        return self.embed.weight
