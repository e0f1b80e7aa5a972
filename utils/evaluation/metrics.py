"""Measures of images and of their features, pure functions on tensors."""

import numpy as np
import scipy.linalg
import torch

BLOCK = 1024  # rows of features that are compared with as many others at a time


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair, [B] in dB, of images [B, C, H, W] in [0, 1]."""
    error = (images.double() - others.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()


# --- Fréchet distance ----------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of features that come in a stream, exact in float64.

    Features are merged in blocks of a fixed size (Chan et al., 1979), so that the batches they
    come in do not matter.
    """

    block = 256

    def __init__(self):
        self.count, self.waiting = 0, []
        self.mean = self.scatter = None  # float64 [D]; [D, D], the sum of squared deviations

    def update(self, features):
        """Add features [b, D]."""
        for row_block in features.double().cpu().split(self.block):
            self.waiting.append(row_block)
            if sum(map(len, self.waiting)) >= self.block:
                waiting = torch.cat(self.waiting)
                self._merge(waiting[: self.block])
                self.waiting = [waiting[self.block :]]

    def _merge(self, features):
        count = len(features)
        if count == 0:
            return
        mean = features.mean(0)
        deviations = features - mean
        scatter = deviations.T @ deviations
        if self.count:
            total = self.count + count
            difference = mean - self.mean
            scatter += self.scatter
            scatter += torch.outer(difference, difference) * (self.count * count / total)
            mean = self.mean + difference * (count / total)
        self.mean, self.scatter, self.count = mean, scatter, self.count + count

    def finish(self):
        """(mean [D], covariance [D, D]) of all so far, numpy float64; needs two vectors."""
        if self.waiting:
            self._merge(torch.cat(self.waiting))
            self.waiting = []
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors or more, not {self.count}")
        return self.mean.numpy(), (self.scatter / (self.count - 1)).numpy()

    def state_dict(self):
        """What `from_state` makes the same statistics of."""
        self.finish()
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state):
        statistics = cls()
        for name in ("count", "mean", "scatter"):
            setattr(statistics, name, state[name])
        return statistics


def covariance_factor(covariance):
    """A [r, D] with A^T A = covariance [D, D] of rank r."""
    values, vectors = scipy.linalg.eigh(covariance)
    # With fewer vectors than dimensions most eigenvalues are zero, but for rounding, whose square
    # roots would add up.
    kept = values > len(values) * np.finfo(np.float64).eps * values.max()
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), FID's formula (Heusel et al., 1706.08500).

    Means [D] and covariances [D, D] are float64 arrays. With C = A^T A the trace of the root is
    the sum of the singular values of A1 A2^T, which unlike the root itself is well conditioned
    where covariances are singular.
    """
    difference = mean_1 - mean_2
    factors = [covariance_factor(covariance) for covariance in (covariance_1, covariance_2)]
    root = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return float(
        difference @ difference + np.trace(covariance_1) + np.trace(covariance_2) - 2 * root
    )


# --- precision, recall, density, coverage ------------------------------------------------------


def block_distances(x, y, same=False):
    """Euclidean distances [m, n] of vectors x [m, D] and y [n, D].

    Computed in float64 and rounded to the type of x, squared, before the root, as scikit-learn
    does. `same`: x and y are the same vectors, each at distance 0 from itself.
    """
    a, b = x.double(), y.double()
    squared = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    squared = squared.add_(a.square().sum(1)[:, None]).to(x.dtype).clamp_(min=0)
    if same:
        squared.fill_diagonal_(0)
    return squared.sqrt_()


def kth_distances(x, k, block=BLOCK, progress=None):
    """Distance [n] of each vector of x [n, D] to its k-th nearest other one."""
    nearest = x.new_full((len(x), k + 1), float("inf"))  # itself among them

    def merge(rows, distances):
        best = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        together = torch.cat((nearest[rows], best), dim=1)
        nearest[rows] = together.topk(k + 1, largest=False).values

    for top in range(0, len(x), block):
        rows = slice(top, top + block)
        for left in range(top, len(x), block):  # the matrix is symmetric
            columns = slice(left, left + block)
            distances = block_distances(x[rows], x[columns], same=left == top)
            merge(rows, distances)
            if left > top:
                merge(columns, distances.T)
            if progress:
                progress(1)
    return nearest.amax(1)


def prdc(real, fake, nearest_k, block=BLOCK, progress=None):
    """Precision, recall (Kynkäänniemi et al., 1904.06991), density and coverage (Naeem et al.,
    2002.09797) of features real [n, D] and fake [m, D], a dict of floats.

    A vector lies in the ball of another one where it is nearer than that one's k-th nearest
    neighbour of its own kind. The distance matrices are never held, only blocks of them;
    `progress(blocks)` is called as they are done, `prdc_blocks` of them in all. Raises ValueError
    where there are not more than k vectors of either kind.
    """
    if min(len(real), len(fake)) <= nearest_k:
        raise ValueError(f"{nearest_k} neighbours need more vectors than {len(real)}, {len(fake)}")
    real_radii = kth_distances(real, nearest_k, block, progress)
    fake_radii = kth_distances(fake, nearest_k, block, progress)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # of real ones, around
    recalled, covered = torch.zeros((2, len(real)), dtype=torch.bool, device=real.device)
    for top in range(0, len(real), block):
        rows = slice(top, top + block)
        for left in range(0, len(fake), block):
            columns = slice(left, left + block)
            distances = block_distances(real[rows], fake[columns])
            in_real = distances < real_radii[rows, None]
            balls[columns] += in_real.sum(0)
            covered[rows] |= in_real.any(1)
            recalled[rows] |= (distances < fake_radii[columns]).any(1)
            if progress:
                progress(1)
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": (1 / nearest_k) * balls.double().mean().item(),
        "coverage": covered.double().mean().item(),
    }


def prdc_blocks(n, m, block=BLOCK):
    """How many blocks `prdc` compares for n real and m fake features."""
    rows, columns = -(-n // block), -(-m // block)
    return rows * (rows + 1) // 2 + columns * (columns + 1) // 2 + rows * columns
