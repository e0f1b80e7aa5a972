"""The transformer of both samplers: denoiser of the absorbing diffusion, or causal prior.

Shapes: B batch, N tokens = grid height x width, C = bert_n_emb.
"""

import re

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.messages import listed
from models.neighborhood_attention import check_neighborhood
from models.prior.attention import FullAttention, HydraNeighborhoodAttention

# In messages: arguments of attention, and what the settings call them.
SETTINGS = {
    "`dim`": "`bert_n_emb`", "`num_heads`": "`bert_n_head`", "`attn_drop`": "`attn_pdrop`",
    "`rope`": "`position` rope", "`kernel_size`": "`kernel_sizes`", "`dilation`": "`dilations`",
}

# Numbers of x, 1 MiB in float32, that a CPU takes through the blocks together. With 24 blocks of
# 512 channels, batches of 8 to 16 images run 1.1 to 1.3 times as fast in parts of 2 (one thread of
# an AMD EPYC).
IN_CACHE = 2**18


def check_attention(H):
    """Raise ValueError where attention does not fit the sampler, the positions or the grid."""
    if H.sampler == "autoregressive" and H.attention == "hydra":
        raise ValueError("`sampler` autoregressive needs `attention` full: hydra looks ahead")
    if H.attention == "full" and H.position != ["absolute"]:
        raise ValueError(f"`attention` full has absolute positions only, not {listed(H.position)}")
    _, height, width = H.latent_shape
    if H.block_size != height * width:
        raise ValueError(
            f"`block_size` {H.block_size} is not the number of ids of `latent_shape` "
            f"{listed(H.latent_shape)}, {height * width}"
        )


class Block(nn.Module):
    """Pre-norm residual block on a grid [B, height, width, C]."""

    def __init__(self, H):
        super().__init__()
        dim = H.bert_n_emb
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        if H.attention == "hydra":
            self.attn = HydraNeighborhoodAttention(
                dim, H.kernel_sizes, H.bert_n_head, attn_drop=H.attn_pdrop,
                proj_drop=H.resid_pdrop, dilations=H.dilations, rpb="rpb" in H.position,
                rope="rope" in H.position,
            )
        else:
            self.attn = FullAttention(
                dim, H.bert_n_head, attn_drop=H.attn_pdrop, proj_drop=H.resid_pdrop,
                causal=H.sampler == "autoregressive", block_size=H.block_size,
            )
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(H.resid_pdrop)
        )

    def attend(self, x, cache=None):
        """x [B, h, w, C] and its attention; `cache` as of FullAttention."""
        h = self.ln1(x)
        if isinstance(self.attn, HydraNeighborhoodAttention):
            return x + self.attn(h)
        return x + self.attn(h.flatten(1, 2), cache).view_as(x)

    def transform(self, x):
        """x [..., C] and what the MLP makes of each position."""
        return x + self.mlp(self.ln2(x))

    def forward(self, x, cache=None):
        """Transform x [B, h, w, C]."""
        return self.transform(self.attend(x, cache))


class Transformer(nn.Module):
    """Token ids [B, N] to logits [B, N, codebook_size].

    As a denoiser (`H.sampler == "absorbing"`) it has one more input id, the mask, and does not
    see the time. As a causal prior its input is shifted right by a learned start token.
    `H.position` `absolute` adds a table to the embeddings and ties the model to its grid; `rpb`
    and `rope` live in the attention. Where `checkpoint_blocks` is true, training keeps only the
    input of each block and computes the rest again: less memory, a third more time. Raises
    ValueError for settings that do not fit together.
    """

    def __init__(self, H):
        super().__init__()
        check_attention(H)
        self.causal = H.sampler == "autoregressive"
        self.checkpoint_blocks = False
        self.grid = tuple(H.latent_shape[1:])
        dim = H.bert_n_emb
        # In the order of the published files, by which their optimisers number the parameters.
        # Only the causal prior learns start_tok; the published denoisers' files hold it too.
        absolute = "absolute" in H.position
        self.pos_emb = nn.Parameter(torch.zeros(1, H.block_size, dim)) if absolute else None
        self.start_tok = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=self.causal)
        self.tok_emb = nn.Embedding(H.codebook_size + (not self.causal), dim)
        self.drop = nn.Dropout(H.embd_pdrop)
        try:
            self.blocks = nn.ModuleList(Block(H) for _ in range(H.bert_n_layers))
            if H.attention == "hydra":
                for _, kernel_size, dilation in self.blocks[0].attn.groups:
                    check_neighborhood(*self.grid, kernel_size, dilation)
        except ValueError as error:
            message = re.sub("`.+?`", lambda name: SETTINGS.get(name[0], name[0]), str(error))
            raise ValueError(message) from None
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, H.codebook_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Normal(0, 0.02) weights and zero biases (GPT-2); the standard deviation of the last
        layers of residual branches is divided by sqrt(2 * layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                last = name.endswith(("attn.proj.weight", "mlp.2.weight"))
                depth = (2 * len(self.blocks)) ** -0.5 if last else 1.0
                nn.init.normal_(parameter, std=0.02 * depth)

    def forward(self, ids, grid=None, caches=None, where=None):
        """Logits [B, N, codebook_size] for ids [B, N] laid out row by row on `grid` (h, w), by
        default the one trained on; with `where` bool [B, N] only those M: [M, codebook_size].

        A causal model predicts token i from ids[:, :i], so N ids give N+1 predictions; with
        `caches` (one dict a block, empty at first) it predicts only the token that follows ids, of
        which the caches hold all but the last. Absolute positions on another grid: ValueError.
        """
        if self.causal:
            return self.causal_forward(ids, caches)
        grid = tuple(grid or self.grid)
        x = self.tok_emb(ids)
        if self.pos_emb is not None:
            if grid != self.grid:
                raise ValueError(f"a model with absolute positions runs on {self.grid} only")
            x = x + self.pos_emb
        x = self.drop(x).unflatten(1, grid)  # [B, h, w, C]
        if where is None:
            x = self.run_blocks(self.blocks, x).flatten(1, 2)
        else:
            last = self.blocks[-1]
            x = last.attend(self.run_blocks(self.blocks[:-1], x))
            x = last.transform(x.flatten(1, 2)[where])  # [M, C]
        return self.head(self.ln_f(x))

    def run_blocks(self, blocks, x):
        """x [B, h, w, C] after `blocks`, each computed again in backward if they are checkpoints
        (`checkpoint_blocks`). Without gradients a CPU takes a few images at a time through all of
        them, whose features stay in the processor's caches; not through compiled blocks, whose code
        is for whole batches."""
        is_plain = not (torch.is_grad_enabled() or self.is_compiled)
        if is_plain and x.device.type == "cpu" and x.numel() > IN_CACHE:
            parts = x.split(max(1, IN_CACHE // x[0].numel()))
            if len(parts) > 1:
                return torch.cat([self.run_blocks(blocks, part) for part in parts])
        again = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    @property
    def is_compiled(self):
        """Whether `compile_blocks` was called on this model: copies of it are not compiled."""
        return self.blocks[0]._compiled_call_impl is not None

    def compile_blocks(self, **options):
        """Compile every block, and nothing else; names in the state dict stay as they are.

        As all blocks have one code object, one compiled code serves them all. `options` are those
        of torch.compile. The blocks are compiled at their first call, for each grid and batch size
        anew.
        """
        for block in self.blocks:
            block.compile(**{"fullgraph": True, "dynamic": False} | options)

    def causal_forward(self, ids, caches=None):
        """Logits of the token after each of ids [B, N], the start included (see `forward`)."""
        first = 0 if caches is None else ids.shape[1]  # the position that is computed first
        x = self.tok_emb(ids[:, max(first - 1, 0) :])
        if first == 0:
            x = torch.cat((self.start_tok.expand(len(ids), -1, -1), x), dim=1)
        x = x + self.pos_emb[:, first : ids.shape[1] + 1]
        x = self.drop(x).unsqueeze(1)  # [B, 1, N, C]: a sequence is a grid of one row
        if caches is None:
            x = self.run_blocks(self.blocks, x)
        else:
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cache)
        return self.head(self.ln_f(x.flatten(1, 2)))
