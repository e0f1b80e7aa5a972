"""Measures of images and of their features: functions on tensors, and the table METRICS.

To add a metric, write a class like those at the end, enter it in METRICS, and declare a flag of its
name in the group FID of hparams/experiment_groups.py.
"""

import itertools

import numpy as np
import scipy.linalg
import torch
from torch.nn import functional as F
from torch_fidelity import metric_isc, metric_kid, metric_prc
from tqdm import tqdm

from utils.errors import UserError

SSIM_WINDOW = 11  # pixels of a side
BLOCK = 1024  # rows of features that are compared with as many others at a time


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair, [B] in dB, of images [B, C, H, W] in [0, 1]."""
    error = (images.double() - others.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()


def ssim(images, others):
    """Structural similarity of each pair, [B], of images [B, C, H, W] in [0, 1] with sides of 11
    pixels or more: 1 for equal ones.

    Its mean over channels and over all 11 x 11 windows that lie in the image, weighted by a
    Gaussian of deviation 1.5 (Wang et al., 2004, eq. 13, doi 10.1109/TIP.2003.819861).
    """
    c1, c2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2, values ranging over L = 1
    places = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = (-places.square() / (2 * 1.5**2)).exp()
    window = (window / window.sum()).to(images.device)

    def local_mean(x):
        """Weighted means [B C, 1, H - 10, W - 10] over the windows of x [B C, 1, H, W]."""
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = (part.double().flatten(0, 1)[:, None] for part in (images, others))
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.unflatten(0, images.shape[:2]).mean((1, 2, 3, 4))


# --- Fréchet distance ----------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of features that come in a stream, in float64.

    They are merged in blocks of a fixed size (Chan et al., 1979), whatever the batches.
    """

    block = 256

    def __init__(self):
        self.count, self.waiting = 0, []
        self.mean = self.scatter = 0.0  # float64 [D]; [D, D], the sum of squared deviations

    def update(self, features):
        """Add features [b, D]."""
        *blocks, rest = torch.cat((*self.waiting, features.double().cpu())).split(self.block)
        for rows in blocks:
            self._merge(rows)
        self.waiting = [rest]

    def _merge(self, features):
        count = len(features)
        if count == 0:
            return
        mean, total = features.mean(0), self.count + count
        deviations, difference = features - mean, mean - self.mean
        scatter = deviations.T @ deviations + self.scatter
        scatter += torch.outer(difference, difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.scatter, self.count = scatter, total

    def _merge_waiting(self):
        if self.waiting:
            self._merge(torch.cat(self.waiting))
            self.waiting = []

    def finish(self):
        """(mean [D], covariance [D, D]) of all so far, numpy float64; needs two vectors."""
        self._merge_waiting()
        if self.count < 2:
            raise ValueError(f"a covariance needs two vectors or more, not {self.count}")
        return self.mean.numpy(), (self.scatter / (self.count - 1)).numpy()

    def state_dict(self):
        """What `from_state` makes the same statistics of."""
        self._merge_waiting()
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state):
        statistics = cls()
        for name in ("count", "mean", "scatter"):
            setattr(statistics, name, state[name])
        return statistics

    def __len__(self):
        return self.count + sum(map(len, self.waiting))


def covariance_factor(covariance):
    """A [r, D] with A^T A = covariance [D, D] of rank r."""
    values, vectors = scipy.linalg.eigh(covariance)
    # With fewer vectors than dimensions most eigenvalues are zero, but for rounding, whose square
    # roots would add up.
    kept = values > len(values) * np.finfo(np.float64).eps * values.max()
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), FID's formula (Heusel et al., 1706.08500).

    Means [D] and covariances [D, D] are float64 arrays.
    """
    factors = [covariance_factor(covariance) for covariance in (covariance_1, covariance_2)]
    traces = np.trace(covariance_1) + np.trace(covariance_2)
    return distance_of_factors(mean_1 - mean_2, *factors, traces)


def distance_of_factors(difference, factor_1, factor_2, traces):
    """The Fréchet distance of means that differ by `difference` [D], and of covariances C = A^T A
    of factors A [r, D], the sum of whose traces is given."""
    # These sum up to the trace of the root of C1 C2, but unlike the root itself they are well
    # conditioned where covariances are singular.
    root = scipy.linalg.svdvals(factor_1 @ factor_2.T).sum()
    return float(difference @ difference + traces - 2 * root)


def frechet_distance_of_features(features, others):
    """`frechet_distance` of the means and covariances of features [n, D] and [m, D], n, m > 1.

    Takes n x m numbers where that is less than the D x D of covariances.
    """
    if max(len(features), len(others)) > features.shape[1]:
        statistics = []
        for part in (features, others):
            statistics.append(FeatureStatistics())
            statistics[-1].update(part)
        return frechet_distance(*(value for part in statistics for value in part.finish()))
    means, factors = [], []
    for part in (features, others):
        part = part.double().cpu().numpy()
        means.append(part.mean(0))
        factors.append((part - means[-1]) / np.sqrt(len(part) - 1))  # A^T A is the covariance
    traces = sum(np.square(factor).sum() for factor in factors)
    return distance_of_factors(means[0] - means[1], *factors, traces)


# --- precision, recall, density, coverage ------------------------------------------------------


def block_distances(x, y, same=False):
    """Euclidean distances [m, n] of vectors x [m, D] and y [n, D], which may be the `same`.

    The squares are computed in float64 and rounded to the type of x, as scikit-learn does.
    """
    a, b = x.double(), y.double()
    squared = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    squared = squared.add_(a.square().sum(1)[:, None]).to(x.dtype).clamp_(min=0)
    if same:
        squared.fill_diagonal_(0)
    return squared.sqrt_()


def blocks(n, m, block):
    """Iterator of the (rows, columns) of the blocks of an n x m matrix, with a progress bar."""
    pairs = itertools.product(range(0, n, block), range(0, m, block))
    found = [(slice(top, top + block), slice(left, left + block)) for top, left in pairs]
    return tqdm(found, desc="distances", unit="block", dynamic_ncols=True)


def kth_distances(x, k, block=BLOCK):
    """Distance [n] of each vector of x [n, D] to its k-th nearest other one."""
    nearest = x.new_full((len(x), k + 1), float("inf"))  # itself among them

    def merge(rows, distances):
        best = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        together = torch.cat((nearest[rows], best), dim=1)
        nearest[rows] = together.topk(k + 1, largest=False).values

    for rows, columns in blocks(len(x), len(x), block):
        if columns.start < rows.start:
            continue  # the matrix is symmetric
        same = columns == rows
        distances = block_distances(x[rows], x[columns], same)
        merge(rows, distances)
        if not same:
            merge(columns, distances.T)
    return nearest.amax(1)


def prdc(real, fake, nearest_k, block=BLOCK):
    """Precision, recall (Kynkäänniemi et al., 1904.06991), density and coverage (Naeem et al.,
    2002.09797) of features real [n, D] and fake [m, D], a dict of floats.

    A vector lies in the ball of another one where it is nearer than that one's k-th nearest
    neighbour of its own kind. Raises ValueError unless there are more than k vectors of each kind.
    """
    if min(len(real), len(fake)) <= nearest_k:
        raise ValueError(f"{nearest_k} neighbours need more vectors than {len(real)}, {len(fake)}")
    real_radii = kth_distances(real, nearest_k, block)
    fake_radii = kth_distances(fake, nearest_k, block)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # of real ones, around
    recalled, covered = torch.zeros((2, len(real)), dtype=torch.bool, device=real.device)
    for rows, columns in blocks(len(real), len(fake), block):
        distances = block_distances(real[rows], fake[columns])
        in_real = distances < real_radii[rows, None]
        balls[columns] += in_real.sum(0)
        covered[rows] |= in_real.any(1)
        recalled[rows] |= (distances < fake_radii[columns]).any(1)
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": (1 / nearest_k) * balls.double().mean().item(),
        "coverage": covered.double().mean().item(),
    }


# --- the table -----------------------------------------------------------------------------------


class Metric:
    """A measure of generated images; H gives its settings, `device` computes it.

    `layer` is the metric of torch-fidelity whose layer of the extractor is compared; `real` what is
    needed of real images: "statistics" of all, "features" of as many as are generated, or None.
    It needs `least` generated images, and as many real ones where it needs any. The sentence about
    too few calls it `title`, and says what helps beside more images, `otherwise`.
    """

    layer, real = "fid", None
    least, title, otherwise = 1, "the measure", ""

    def __init__(self, H, device):
        self.H, self.device, self.chunks = H, device, []

    def check(self, generated, real):
        """Raise UserError where there are too few images of a kind; None is an unknown number."""
        for kind, count in (("generated", generated), ("real", real if self.real else None)):
            if count is None or count >= self.least:
                continue
            samples = kind == "generated" and hasattr(self.H, "n_samples")
            more = "raise --n_samples" if samples else "add images to the dataset"
            raise UserError(f"{self.title} needs {self.least} {kind} images or more, not {count}: "
                            f"{more}{self.otherwise}")

    def update(self, features):
        """Take features [b, D] of generated images into account."""
        self.chunks.append(features)

    def finish(self, real, log):
        """The figures, a dict of numbers; `real` is what `self.real` asks for."""
        raise NotImplementedError


class FID(Metric):
    """Fréchet inception distance (Heusel et al., 1706.08500) to all real images."""

    real = "statistics"
    least, title = 2, "FID"  # for a covariance

    def __init__(self, H, device):
        super().__init__(H, device)
        self.statistics = FeatureStatistics()

    def update(self, features):
        self.statistics.update(features)

    def finish(self, real, log):
        moments, count = self.statistics.finish(), self.statistics.count
        if count <= len(moments[0]):
            log.warning(f"{count} images are few for {len(moments[0])} features: compare this FID "
                        f"with those of as many images only")
        distance = frechet_distance(*real.finish(), *moments)
        return {"FID": distance, "images": count, "real images": real.count}


class KID(Metric):
    """Kernel inception distance (Binkowski et al., 1801.01401)."""

    real, otherwise = "features", ", or lower --kid_subset_size"

    def __init__(self, H, device):
        super().__init__(H, device)
        self.least, self.title = H.kid_subset_size, f"KID of --kid_subset_size {H.kid_subset_size}"

    def finish(self, real, log):
        kid = metric_kid.kid_features_to_metric(
            torch.cat(self.chunks), real, kid_subset_size=self.H.kid_subset_size, verbose=False
        )
        return {"KID": kid[metric_kid.KEY_METRIC_KID_MEAN],
                "KID, deviation": kid[metric_kid.KEY_METRIC_KID_STD]}


class InceptionScore(Metric):
    """Inception score (Salimans et al., 1606.03498)."""

    layer = "isc"
    least, title = 10, "the inception score, a mean over 10 parts of the images,"
    otherwise = ", or leave --isc out"

    def finish(self, real, log):
        isc = metric_isc.isc_features_to_metric(torch.cat(self.chunks), splits=self.least)
        return {"IS": isc[metric_isc.KEY_METRIC_ISC_MEAN],
                "IS, deviation": isc[metric_isc.KEY_METRIC_ISC_STD]}


class PrecisionRecall(Metric):
    """Precision and recall (Kynkäänniemi et al., 1904.06991), on FID's layer."""

    real, neighbours = "features", 3
    least, title = neighbours + 1, f"--prc, with {neighbours} neighbours of each image,"
    otherwise = ", or leave --prc out"

    def finish(self, real, log):
        prc = metric_prc.prc_features_to_metric(
            torch.cat(self.chunks), real, prc_neighborhood=self.neighbours, save_cpu_ram=True,
            prc_batch_size=1000, verbose=False,
        )
        return {"precision": prc[metric_prc.KEY_METRIC_PRECISION],
                "recall": prc[metric_prc.KEY_METRIC_RECALL]}


class PRDC(Metric):
    """Precision, recall, density and coverage (Naeem et al., 2002.09797)."""

    layer, real, otherwise = "prc", "features", ", or lower --nearest_k"

    def __init__(self, H, device):
        super().__init__(H, device)
        self.least, self.title = H.nearest_k + 1, f"PRDC with --nearest_k {H.nearest_k}"

    def finish(self, real, log):
        generated = torch.cat(self.chunks)
        if real.shape[1] != generated.shape[1]:
            raise UserError(f"--real_feats hold {real.shape[1]} numbers an image, --fake_feats "
                            f"{generated.shape[1]}: they are of different extractors")
        figures = prdc(real.to(self.device), generated.to(self.device), self.H.nearest_k)
        return {**figures, "real images": len(real), "samples": len(generated)}


class PSNR(Metric):
    """Mean PSNR of reconstructions, given in place of features."""

    layer = "psnr"

    def finish(self, real, log):
        return {"PSNR (dB)": torch.cat(self.chunks).mean().item()}


METRICS = {
    "fid": FID, "kid": KID, "isc": InceptionScore, "prc": PrecisionRecall, "prdc": PRDC,
    "psnr": PSNR,
}


def metrics_asked_for(H):
    """The names of the METRICS that have a flag of their own which is given."""
    return [name for name in METRICS if getattr(H, name, False)]
