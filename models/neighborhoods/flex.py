"""Neighborhood attention by torch's FlexAttention: one fused kernel for all heads of a layer.

The neighborhood of each head is a `mask_mod`, its relative bias a `score_mod`, whose gradient the
kernel adds up by atomic operations: in no fixed order. Blocks of BLOCK x BLOCK tokens of which no
query attends to a key are skipped; a grid of fewer tokens is one block, which FlexAttention fills
up by itself.

Shapes: B batch, H W grid, N = H*W tokens, h heads, e head_dim; n = ceil(N / BLOCK) blocks.
"""

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException

from models.devices import compiler_problem
from models.neighborhoods.geometry import axis_offset, constant

FLEX_PROBLEM = None
try:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
except ImportError as error:
    FLEX_PROBLEM = f"this torch has no FlexAttention ({error})"

BLOCK = 128  # tokens of a block of queries or keys: what FlexAttention's kernels expect
COMPILED_SHAPES = 64  # grids, kernels and types that are compiled before torch gives up


class Blocks(NamedTuple):
    """Which blocks of keys each block of queries needs, and the reverse, as BlockMask wants them:
    int32 [1, h, n] and [1, h, n, n]."""

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor


def flex_problem(query):
    """Why FlexAttention cannot attend with `query` [B, H, W, h, e], as a sentence; None when it
    can. A CPU computes what its kernel would, with all scores in memory."""
    if FLEX_PROBLEM or query.device.type == "cpu":
        return FLEX_PROBLEM
    if query.device.type != "cuda":
        return f"FlexAttention is used on CUDA and CPUs only, not on {query.device.type}"
    dim = query.shape[-1]
    if dim < 16 or dim & (dim - 1):
        return f"FlexAttention's kernels need a power of two from 16 channels a head, not {dim}"
    if query.dtype == torch.float64:
        return "FlexAttention's kernels have no float64"
    problem = compiler_problem("cuda")
    return problem and f"FlexAttention is compiled, and {problem}"


def ordered(used):
    """bool [h, n, n], which columns each row uses, as their numbers [1, h, n] and indices, the used
    first [1, h, n, n]: int32."""
    indices = used.int().argsort(dim=-1, descending=True, stable=True)
    return used.sum(-1, dtype=torch.int32)[None], indices.int()[None].contiguous()


@constant
def neighborhood_blocks(height, width, groups, device):
    """The `Blocks` of `groups` of Heads, as a plain tuple. One block of queries is looked at a
    time, so that memory is linear in the number of tokens."""
    tokens = height * width
    count = -(-tokens // BLOCK)
    position = torch.arange(tokens, device=device)
    heads = []
    for group in groups:
        rows = axis_offset(height, *group[1:], device) >= 0
        columns = axis_offset(width, *group[1:], device) >= 0
        used = []
        for query in position.split(BLOCK):
            attends = rows[query // width][:, position // width]
            attends = attends & columns[query % width][:, position % width]
            padded = F.pad(attends.any(0), (0, count * BLOCK - tokens))
            used.append(padded.view(count, BLOCK).any(1))
        heads += [torch.stack(used)] * group.count
    used = torch.stack(heads)  # [h, n, n]
    return (*ordered(used), *ordered(used.mT))


@constant
def head_sizes(groups, device):
    """Kernel size and dilation of each head: two int32 [h]."""
    sizes = [group[1:] for group in groups for _ in range(group.count)]
    kernels, dilations = torch.tensor(sizes, dtype=torch.int32, device=device).unbind(1)
    return kernels.contiguous(), dilations.contiguous()


def stack_tables(tables):
    """Bias tables [heads, side, side] of several sides, one after the other and filled up with
    zeros to the largest: [h, side, side]."""
    side = max(table.shape[-1] for table in tables)
    tables = [
        table if table.shape[-1] == side
        else F.pad(table, (0, side - table.shape[-1]) * 2)
        for table in tables
    ]
    return tables[0] if len(tables) == 1 else torch.cat(tables)


def attends_along(query, key, length, kernel_size, dilation):
    """Whether position `query` of an axis attends to `key`: `table_offset` without its -1."""
    members = (length - query % dilation + dilation - 1) // dilation
    first = torch.clamp(query // dilation - kernel_size // 2, min=0)
    nth = key // dilation - torch.minimum(first, members - kernel_size)
    return (key % dilation == query % dilation) & (nth >= 0) & (nth < kernel_size)


def modifiers(height, width, kernels, dilations, table):
    """(mask_mod, score_mod) of FlexAttention for heads with `kernels` and `dilations`, int32 [h];
    score_mod adds from `table` [h, side, side], and is None where `table` is."""

    def mask_mod(b, h, query, key):
        kernel, dilation = kernels[h], dilations[h]
        in_row = attends_along(query // width, key // width, height, kernel, dilation)
        return in_row & attends_along(query % width, key % width, width, kernel, dilation)

    def score_mod(score, b, h, query, key):
        middle, dilation = kernels[h] - 1, dilations[h]
        row = (key // width - query // width) // dilation + middle
        column = (key % width - query % width) // dilation + middle
        last = table.shape[-1] - 1  # what lies outside the table lies outside the neighborhood
        return score + table[h, torch.clamp(row, 0, last), torch.clamp(column, 0, last)]

    return mask_mod, None if table is None else score_mod


def kernel_options(query):
    """What FlexAttention's kernels compute at once. Its own choice, made for plain attention, does
    not leave the registers and the shared memory that these masks and biases take."""
    wide = query.dtype.itemsize > 2 or query.shape[-1] > 64
    return {
        "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32 if wide else 64, "fwd_num_stages": 2,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32 if wide else 64,
        "bwd_BLOCK_M2": 32 if wide else 64, "bwd_BLOCK_N2": 32, "bwd_num_stages": 2,
    }


def fused(query, key, value, table, grid, blocks, sizes, scale):
    """FlexAttention of query, key and value [B, h, N, e] on `grid` (H, W); to be compiled."""
    mask_mod, score_mod = modifiers(*grid, *sizes, table)
    tokens = query.shape[2]
    block_mask = BlockMask(
        seq_lengths=(tokens, tokens), full_kv_num_blocks=None, full_kv_indices=None,
        full_q_num_blocks=None, full_q_indices=None, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod,
        **Blocks(*blocks)._asdict(),
    )
    return flex_attention(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale,
        kernel_options=kernel_options(query),
    )


def unfused(query, key, value, table, grid, blocks, sizes, scale):
    """`fused` with all scores in memory: for CPUs, where FlexAttention has no gradients."""
    mask_mod, score_mod = modifiers(*grid, *sizes, table)
    heads, tokens = query.shape[1:3]
    position = torch.arange(tokens, device=query.device)
    where = torch.arange(heads, device=query.device)[:, None, None], position[:, None], position
    scores = query @ key.mT * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if score_mod is not None:
        scores = score_mod(scores, None, *where)
    scores = scores.masked_fill(~mask_mod(None, *where), float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


@lru_cache(maxsize=1)
def compiled():
    """`fused`, compiled for each set of shapes at its first call."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_SHAPES)
    code = torch.compile(fused, fullgraph=True, dynamic=False)

    def attend(*arguments):
        # Also where nothing else is to be compiled: without code all scores would be in memory.
        with torch.compiler.set_stance("default"):
            return code(*arguments)

    return attend


def flex_attend_if_it_compiles(*arguments):
    """`flex_attend`, or None where its kernel does not come about on this device: that is a
    `flex_problem` from then on, of which a warning tells."""
    global FLEX_PROBLEM
    try:
        return flex_attend(*arguments)
    except torch.OutOfMemoryError:
        raise
    except (TorchDynamoException, RuntimeError) as error:  # Triton's arrive as the latter
        reason = str(error).strip().partition("\n")[0]
        FLEX_PROBLEM = f"FlexAttention's kernel does not compile here ({reason})"
        warnings.warn(f"{FLEX_PROBLEM}: another backend attends", stacklevel=2)


def flex_attend(query, key, value, groups, tables, scale):
    """One attention of all heads by FlexAttention; arguments as of `hydra_attention`."""
    _, height, width, _, _ = query.shape
    device = query.device
    inputs = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]  # [B, h, N, e]
    table = None
    if tables is not None:
        wide = torch.promote_types(tables[0].dtype, torch.float32)  # its gradient is a long sum
        table = stack_tables(tables).to(wide).contiguous()
    differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*inputs, table)
    )
    if device.type == "cpu" and (differentiated or not torch.compiler.is_compiling()):
        attend = unfused
    else:
        attend = fused if torch.compiler.is_compiling() else compiled()
    with torch.autocast(device.type, enabled=False):  # all is of one type here
        out = attend(
            *inputs, table, (height, width), neighborhood_blocks(height, width, groups, device),
            head_sizes(groups, device), scale,
        )
    return out.transpose(1, 2).unflatten(1, (height, width))
