"""Settings of the transformer that do not fit together, in the words of the settings."""

import re
from types import SimpleNamespace

import pytest
import torch

from models import Transformer

SETTINGS = dict(
    sampler="absorbing", attention="hydra", position=["rpb", "absolute"], latent_shape=[1, 8, 8],
    block_size=64, bert_n_emb=32, bert_n_head=4, bert_n_layers=2, kernel_sizes=[3, 7],
    dilations=[1], codebook_size=12, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)


def build(**changes):
    with torch.device("meta"):
        return Transformer(SimpleNamespace(**SETTINGS | changes))


@pytest.mark.parametrize("changes, message", [
    (dict(sampler="autoregressive"),
     "`sampler` autoregressive needs `attention` full: hydra looks ahead"),
    (dict(attention="full"), "`attention` full has absolute positions only, not rpb absolute"),
    (dict(attention="full", position=["rope"]), "has absolute positions only, not rope"),
    (dict(block_size=63), "`block_size` 63 is not the number of ids of `latent_shape` 1 8 8, 64"),
    (dict(bert_n_head=7), "`bert_n_head` 7 does not divide `bert_n_emb` 32"),
    (dict(bert_n_head=7, attention="full", position=["absolute"]),
     "`bert_n_head` 7 does not divide `bert_n_emb` 32"),
    (dict(kernel_sizes=[3, 5, 7], dilations=[1, 1]),
     "`kernel_sizes` 3 5 7 and `dilations` 1 1 must be equally many, or one of either for all"),
    (dict(kernel_sizes=[3] * 5), "5 groups of `kernel_sizes` and `dilations` need at least 5 "
     "heads, not `bert_n_head` 4"),
    (dict(kernel_sizes=[1], dilations=[1, 2, 3, 4, 5]), "5 groups of `kernel_sizes` and"),
    (dict(attn_pdrop=0.1), "`attn_pdrop` must be 0: hydra attention has no attention dropout"),
    (dict(position=["rope"], bert_n_emb=24), "`position` rope needs `bert_n_emb` / `bert_n_head` "
     "to be a multiple of 4, not 24 / 4"),
    (dict(kernel_sizes=[3, 4]), "`kernel_sizes` must be odd, not 4"),
    (dict(kernel_sizes=[3, 9]), "`kernel_sizes` 9 x `dilations` 1 = 9 is larger than the 8x8 grid"),
    (dict(kernel_sizes=[3, 5], dilations=[1, 2]), "`kernel_sizes` 5 x `dilations` 2 = 10 is "),
    (dict(latent_shape=[1, 6, 16], block_size=96), "= 7 is larger than the 6x16 grid"),
    (dict(dilations=[0]), "`dilations` must be at least 1, not 0"),
])
def test_invalid_settings_raise(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**changes)


def test_one_kernel_serves_several_dilations():
    attn = build(kernel_sizes=[3], dilations=[1, 2]).blocks[0].attn
    assert (attn.kernel_sizes, attn.dilations) == ([3, 3], [1, 2])
