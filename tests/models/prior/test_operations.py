"""Operations that a block of the transformer dispatches: what a GPU would be asked to launch."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.prior.transformer import Block

SETTINGS = dict(
    sampler="absorbing", attention="hydra", position=["rope", "absolute"], latent_shape=[1, 16, 16],
    block_size=256, bert_n_emb=512, bert_n_head=8, kernel_sizes=[3, 7], dilations=[1],
    attn_pdrop=0.0, resid_pdrop=0.0,
)
# Operations that look at memory in another way and compute nothing.
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}


class OperationCounter(TorchDispatchMode):
    """Counts dispatched operations by name, views aside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*arguments, **options or {})


def count_operations(**settings):
    """Operations of a block's forward and backward under autocast, once its tables are cached."""
    torch.manual_seed(0)
    block = Block(SimpleNamespace(**SETTINGS | settings))
    x = torch.randn(2, 16, 16, 512, requires_grad=True)
    for _ in range(2):
        block.zero_grad()
        x.grad = None
        with OperationCounter() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                out = block(x)
            out.backward(torch.ones_like(out))
    return counter.counts


@pytest.mark.parametrize("position", ["rope absolute", "rpb absolute"])
def test_a_block_dispatches_at_most_100_operations(position):
    counts = count_operations(position=position.split())
    assert counts["addmm"] == 4  # of the four linear layers: the counter counts
    assert counts.total() <= 100, counts


def test_attention_is_one_call_for_all_neighborhoods():
    """More neighborhoods need no more operations."""
    few = count_operations(kernel_sizes=[3, 7])
    many = count_operations(kernel_sizes=[3, 5, 7, 3], dilations=[1, 1, 1, 5])
    assert few == many
