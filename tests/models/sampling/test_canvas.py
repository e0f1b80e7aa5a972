"""Larger canvases: windows against the plain average over all of them, tiles against a whole."""

import pytest
import torch

from helpers import ON_DIGITS
from hparams import get_sampler_hparams
from models import AbsorbingDiffusion, Transformer
from models.sampling.canvas import WindowedDenoiser, decode_canvas, tile_starts
from models.sampling.samplers import sample_raster

FLAGS = (
    f"{ON_DIGITS} --ae_load_dir none --ae_load_step 1 --img_size 32 --codebook_size 12 "
    "--bert_n_emb 32 --bert_n_head 4 --bert_n_layers 1 --total_steps 16 --sampler absorbing"
).split()


def plain_average(net, ids, canvas, window):
    """Mean probabilities [H*W, K] over every window of one canvas [H*W], one at a time."""
    (height, width), (h, w) = canvas, window
    total = torch.zeros(height, width, 12)
    count = torch.zeros(height, width, 1)
    grid = ids.view(height, width)
    for top in range(height - h + 1):
        for left in range(width - w + 1):
            part = grid[top : top + h, left : left + w].reshape(1, -1)
            total[top : top + h, left : left + w] += net(part).softmax(-1).view(h, w, 12)
            count[top : top + h, left : left + w] += 1
    return (total / count).flatten(0, 1)


@torch.no_grad()
def test_windows_equal_the_plain_average():
    torch.manual_seed(0)
    net = Transformer(get_sampler_hparams(FLAGS)).eval()
    canvas, window = (11, 13), (8, 8)
    calls = []

    def denoise(ids, where):
        calls.append(len(ids))
        return net(ids, where=where)

    windowed = WindowedDenoiser(denoise, window, canvas, batch_size=10)
    ids = torch.randint(13, (2, 11 * 13))
    where = torch.rand(2, 11 * 13) < 0.1
    expected = torch.stack([plain_average(net, x, canvas, window) for x in ids])[where]
    logits = windowed(ids, where)
    assert torch.allclose(logits.softmax(-1), expected, atol=1e-5)
    assert torch.allclose((logits / 0.7).softmax(-1), (expected.log() / 0.7).softmax(-1), atol=1e-5)
    assert max(calls) <= 10
    calls.clear()
    corner = torch.zeros(1, 11 * 13, dtype=torch.bool)
    corner[0, 0] = True
    windowed(ids[:1], corner)
    assert sum(calls) == 1  # one window covers the corner
    with pytest.raises(ValueError, match="smaller than the 8x8"):
        WindowedDenoiser(denoise, window, (8, 7))


def test_raster_draws_row_by_row():
    seen = []

    def denoise(ids, where):
        seen.append(where[0].nonzero().flatten().tolist())
        return torch.zeros(int(where.sum()), 3)

    sample_raster(denoise, torch.full((2, 6), 3), 3, 6)
    assert seen == [[0], [1], [2], [3], [4], [5]]
    seen.clear()
    sample_raster(denoise, torch.full((2, 6), 3), 3, 3)
    assert seen == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("position", ["rpb", "rope"])
def test_native_and_windowed_canvases(position):
    torch.manual_seed(0)
    H = get_sampler_hparams([*FLAGS, "--position", position])
    model = AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4)).eval()
    native = model.sample(2, grid=(12, 16), sample_type="first_hitting", sample_steps=10)
    assert native.shape == (2, 192) and native.max() < 12
    windowed = WindowedDenoiser(
        lambda ids, where: model._denoise_fn(ids, where=where), model.shape, (12, 16)
    )
    ids = model.sample(2, grid=(12, 16), denoise=windowed, sample_type="halton", sample_steps=10)
    assert ids.shape == (2, 192) and ids.max() < 12


def test_tiles_decode_like_the_whole():
    """A decoder that looks at one id at a time: tiles must give what the whole does."""
    assert tile_starts(8, 8, 4) == [0] and tile_starts(17, 8, 4) == [0, 4, 8, 9]
    grid = torch.rand(2, 3, 11, 17)
    sizes = []

    def decode(part):
        sizes.append(part.shape[2:])
        return part.repeat_interleave(4, 2).repeat_interleave(4, 3)

    canvas = decode_canvas(decode, grid, (8, 6))
    assert torch.allclose(canvas, decode(grid), atol=1e-6)
    assert set(sizes[:-1]) == {(8, 6)}


@pytest.mark.parametrize("side", [17, 25, 28, 32, 33])
def test_tiles_meet_without_a_seam(side):
    """Tiles of different brightness: from one pixel to the next it changes by little."""
    calls = []

    def decode(part):
        calls.append(len(calls) % 2)
        return torch.full((1, 1, 16 * part.shape[2], 16 * part.shape[3]), float(calls[-1]))

    canvas = decode_canvas(decode, torch.zeros(1, 1, 16, side), (16, 16))
    assert canvas.diff(dim=-1).abs().max() < 0.02
    assert canvas.min() < 0.01 and canvas.max() > 0.5
