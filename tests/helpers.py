"""What several test files share."""

from pathlib import Path

import torch

DATA = Path(__file__).parent / "data"


def golden(name):
    """The golden data of `tests/data/<name>`: inputs, weights and outputs of the originals."""
    return torch.load(DATA / name, weights_only=True)


def assert_close(actual, expected, tolerance=1e-5):
    """Equal shapes, and no entry further apart than `tolerance` times the tensor's scale."""
    assert actual.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f"relative error {error:.2e}"
