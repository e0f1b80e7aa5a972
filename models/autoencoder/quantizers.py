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


def nearest(vectors, codebook):
    """Which entry of a codebook [K, D] each vector [..., D] is nearest to: ids [...]."""
    # |z|^2 is the same for every entry, so argmin does without it.
    return (codebook.square().sum(1) - 2 * vectors @ codebook.t()).argmin(-1)


def draw(vectors, n, rng):
    """`n` of the vectors [m, D], repeated where n > m; `rng` is a generator on the CPU."""
    order = torch.randperm(len(vectors), generator=rng).repeat(-(-n // len(vectors)))
    return vectors[order[:n].to(vectors.device)]


def kmeans(vectors, n, rng, iterations=10):
    """`n` cluster centres [n, D] of vectors [m, D] by Lloyd's algorithm, from a random start.

    A cluster that is empty begins anew from a random vector. `rng` is a generator on the CPU.
    """
    centres = draw(vectors, n, rng)
    for _ in range(iterations):
        ids = nearest(vectors, centres)
        counts = torch.zeros_like(centres[:, 0]).index_add_(0, ids, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(centres).index_add_(0, ids, vectors)
        counts = counts[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), draw(vectors, n, rng))
    return centres


class NearestQuantizer(nn.Module):
    """Each vector becomes the codebook entry at the smallest squared distance (VQ-VAE).

    `beta` weighs the term that moves the *codebook*, as the published models were trained
    (van den Oord et al., 1711.00937, eq. 3, has it on the other term). `entropy_weight` weighs
    `entropy_loss`. While `bypass` is set, which a training loop does, vectors pass as they are.

    With `count_uses` the buffer `uses` counts how often each entry was chosen in training mode,
    and `vectors` [n, D] are those last quantized: what `revive` needs.
    """

    def __init__(self, codebook_size, emb_dim, beta, entropy_weight=0.0, count_uses=False):
        super().__init__()
        self.beta, self.entropy_weight, self.bypass = beta, entropy_weight, False
        self.embedding = nn.Embedding(codebook_size, emb_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.vectors = None
        if count_uses:
            self.register_buffer("uses", torch.zeros(codebook_size, dtype=torch.int64))

    def forward(self, z):
        """z [B, D, h, w] -> (z_q like z, codebook loss (0-d), `codebook_usage`, ids [B, h*w]).

        The gradient of z_q passes straight through to z; the codebook learns from the loss only.
        """
        # Half precision would pick wrong neighbours: vectors lie closer than its rounding.
        with torch.autocast(device_type=z.device.type, enabled=False):
            vectors = z.float().flatten(2).transpose(1, 2)  # [B, h*w, D]
            codebook = self.codebook.float()                # [K, D]
            indices = nearest(vectors, codebook)            # [B, h*w]
            chosen = F.embedding(indices, codebook)         # [B, h*w, D]
            loss = F.mse_loss(vectors, chosen.detach())
            loss = loss + self.beta * F.mse_loss(chosen, vectors.detach())
            if self.entropy_weight:
                loss = loss + self.entropy_weight * entropy_loss(vectors, codebook)
            # z - sg[z] is exactly zero: the generator sees the codebook's entries to the bit, as
            # it will when the sampler draws them, and the gradient is that of the identity.
            quantized = chosen.detach() + (vectors - vectors.detach())
            if self.bypass:
                quantized, loss = vectors, 0 * loss
        z_q = quantized.transpose(1, 2).unflatten(2, z.shape[2:]).to(z.dtype)  # [B, D, h, w]
        usage = codebook_usage(indices, len(codebook))
        if self.training and hasattr(self, "uses"):
            self.uses += usage["usage"]
            self.vectors = vectors.detach().flatten(0, 1)
        return z_q, loss, usage, indices

    @torch.no_grad()
    def initialize(self, vectors, rng):
        """Make the codebook of the cluster centres of vectors [n, D]; `rng` as in `kmeans`."""
        self.codebook.copy_(kmeans(vectors.to(self.codebook.dtype), len(self.codebook), rng))

    @torch.no_grad()
    def revive(self, rng):
        """Replace every entry that was not used since the last call by one of the `vectors` last
        quantized (Dhariwal et al., 2005.00341, section 3); returns which ones: bool [K].

        `rng` is a generator on the CPU.
        """
        dead = self.uses == 0
        drawn = draw(self.vectors, len(dead), rng).to(self.codebook.dtype)
        self.codebook.copy_(torch.where(dead[:, None], drawn, self.codebook))
        self.uses.zero_()
        return dead

    @property
    def codebook(self):
        """The parameter [K, D]."""
        return self.embedding.weight


def entropy_loss(vectors, codebook):
    """E[H(q)] - H(E[q]) in nats, 0-d, for q = softmax(-|z - e|^2) over the codebook [K, D] of each
    of the vectors [B, n, D]: low where each has one entry, and all entries are used alike
    (Yu et al., 2310.05737, eq. 5)."""
    distances = vectors.square().sum(2, keepdim=True) + codebook.square().sum(1)
    q = (2 * vectors @ codebook.t() - distances).softmax(2)  # [B, n, K]
    return torch.special.entr(q).sum(2).mean() - torch.special.entr(q.mean((0, 1))).sum()


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
