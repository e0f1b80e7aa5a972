"""Blending: kept pixels to the bit, and a smooth error inside undone."""

import pytest
import torch

from models.sampling.blending import lay_in


def box(top, bottom, left, right, height=12, width=15):
    hidden = torch.zeros(height, width, dtype=torch.bool)
    hidden[top:bottom, left:right] = True
    return hidden


@pytest.mark.parametrize("hidden, slope", [
    (box(3, 9, 2, 11), 0.01),
    (box(0, 9, 2, 11), 0.0),  # at the image's edge, over which nothing flows
    (box(0, 12, 0, 7), 0.0),
    (box(3, 9, 2, 11) | box(9, 11, 13, 15), 0.0),  # two parts, one in a corner
])
def test_a_smooth_error_is_undone(hidden, slope):
    image = 0.3 + 0.4 * torch.rand(3, 12, 15)
    ramp = 0.1 + slope * (torch.arange(12.0)[:, None] - 2 * torch.arange(15.0))
    laid = lay_in(image, torch.stack((image + ramp, image - ramp)), hidden)
    assert torch.equal(laid[:, :, ~hidden], image[:, ~hidden].expand(2, -1, -1))
    assert torch.allclose(laid, image.expand(2, -1, -1, -1), atol=1e-6)


def test_correction_stays_within_the_differences_at_the_border():
    image, hidden = torch.full((1, 12, 15), 0.5), box(2, 10, 3, 12)
    completion = 0.5 + 0.1 * torch.rand(1, 1, 12, 15)
    taken = completion[0, 0][hidden] - lay_in(image, completion, hidden)[0, 0][hidden]
    border = completion[0, 0][box(1, 11, 2, 13) & ~hidden] - 0.5
    assert taken.min() >= border.min() - 1e-6 and taken.max() <= border.max() + 1e-6
    assert taken.std() > 0


def test_nothing_or_everything_hidden():
    image, completion = torch.rand(1, 12, 15), torch.rand(2, 1, 12, 15)
    assert torch.equal(lay_in(image, completion, box(0, 12, 0, 15)), completion)
    assert torch.equal(lay_in(image, completion, box(0, 0, 0, 0)), image.expand(2, -1, -1, -1))
