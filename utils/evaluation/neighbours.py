"""Nearest neighbours of a few images among very many, which are read in blocks."""

import torch


def squared_distances(vectors, others, columns=2**16):
    """Squared Euclidean distances of vectors [n, M] to others [m, M]: float64 [n, m]."""
    # In float32 |a|^2 + |b|^2 - 2 a.b loses the digits that distances of near images consist of.
    # Some columns at a time, lest all vectors are copied.
    total = 0
    for a, b in zip(vectors.split(columns, dim=1), others.split(columns, dim=1)):
        a, b = a.double(), b.double()
        total = total + a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return total.clamp(min=0)


class NearestNeighbours:
    """The `k` nearest to each of vectors [n, M] of all that `add` has shown.

    `distances` float64 [n, <= k] are squared and ascending, `indices` int64 [n, <= k].
    """

    def __init__(self, vectors, k):
        self.vectors, self.k = vectors, k
        self.distances = vectors.new_empty((len(vectors), 0), dtype=torch.float64)
        self.indices = vectors.new_empty((len(vectors), 0), dtype=torch.int64)

    def add(self, others, indices):
        """Take vectors [m, M] with their numbers, int64 [m], into account."""
        found = squared_distances(self.vectors, others)
        distances = torch.cat((self.distances, found), dim=1)
        indices = torch.cat((self.indices, indices.to(found.device).expand(len(found), -1)), dim=1)
        # A stable sort: of equally near ones the earliest stays, whatever the blocks.
        self.distances, order = distances.sort(dim=1, stable=True)
        self.distances = self.distances[:, : self.k]
        self.indices = indices.gather(1, order[:, : self.k])
