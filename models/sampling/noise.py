"""Random numbers of samples that are drawn together: from one generator, or from several, each of
which serves some of the samples and gives them what it would give them alone.

Wherever functions here take `rng`, it is None for torch's own generator, a `torch.Generator`, or
`Streams`. Shapes: B samples of a batch, M rows of numbers, K columns.
"""

import numpy as np
import torch


class Streams:
    """`generators`, the i-th of which serves the next `counts[i]` samples of a batch of B."""

    def __init__(self, generators, counts):
        self.generators, self.counts = list(generators), list(counts)
        self.stream_of = np.repeat(np.arange(len(self.counts)), self.counts)  # int64 [B]

    def counts_of(self, rows):
        """How many of the samples `rows`, an array int64 [M], each generator serves."""
        return np.bincount(self.stream_of[rows], minlength=len(self.counts)).tolist()


def noise(function, shape, rng, dim=0, **options):
    """`function(shape, generator=, **options)`, such as torch.rand; with `Streams` the numbers of
    each generator one after another along the axis `dim`, that of the samples."""
    if not isinstance(rng, Streams):
        return function(shape, generator=rng, **options)
    if shape[dim] != len(rng.stream_of):
        raise ValueError(f"the generators serve {len(rng.stream_of)} samples, not {shape[dim]}")
    before, after = shape[:dim], shape[dim + 1 :]
    parts = [function((*before, count, *after), generator=generator, **options)
             for generator, count in zip(rng.generators, rng.counts)]
    return torch.cat(parts, dim)


def rows_of_noise(fill, values, rng, rows=None):
    """Fill `values` [M, ...] in place by `fill(values, generator)`; returns them.

    `rows`, an ascending array int64 [M], tells which sample each row belongs to (None: row i to
    sample i). A generator none of whose samples has a row is not touched.
    """
    if not isinstance(rng, Streams):
        return fill(values, rng)
    counts = rng.counts if rows is None else rng.counts_of(rows)
    for generator, part in zip(rng.generators, values.split(counts)):
        if len(part):
            fill(part, generator)
    return values


def exponential(like, rng, rows=None):
    """Draws of Exp(1) in the shape and type of `like` [M, K]; `rows` as in `rows_of_noise`."""
    def fill(values, generator):
        return values.exponential_(generator=generator)

    return rows_of_noise(fill, torch.empty_like(like), rng, rows)


def uniform(count, rng, rows, device):
    """Draws from [0, 1), float64 [M], M = `count`; `rows` as in `rows_of_noise`."""
    def fill(values, generator):
        return values.uniform_(generator=generator)

    values = torch.empty(count, dtype=torch.float64, device=device)
    return rows_of_noise(fill, values, rng, rows)
