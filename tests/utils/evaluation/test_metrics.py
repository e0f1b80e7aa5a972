"""Measures on features against other people's: numpy, scipy, torch-fidelity, prdc."""

import numpy as np
import prdc as reference
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from utils.evaluation.metrics import FeatureStatistics, frechet_distance, kth_distances, prdc


def random_features(seed, n, width, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(n, width, generator=generator) @ mix + shift


def statistics_of(features, batch_size):
    statistics = FeatureStatistics()
    for part in features.split(batch_size):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("n", [2, 255, 256, 257, 1000])
def test_streamed_moments_are_numpys_whatever_the_batches(n):
    features = random_features(0, n, 12, shift=100)  # a mean that drowns the deviations in float32
    moments = {size: statistics_of(features, size).finish() for size in (1, 7, 64, n)}
    mean, covariance = moments[n]
    wide = features.double().numpy()
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-12)
    for other in moments.values():  # blocks are cut alike, whatever the batches
        assert (other[0] == mean).all() and (other[1] == covariance).all()


def test_statistics_are_kept_and_restored():
    statistics = statistics_of(random_features(0, 300, 5), 100)
    restored = FeatureStatistics.from_state(statistics.state_dict())
    for left, right in zip(restored.finish(), statistics.finish()):
        assert (left == right).all()
    with pytest.raises(ValueError, match="two vectors"):
        statistics_of(torch.zeros(1, 5), 1).finish()


def test_frechet_distance_is_the_closed_form_and_torch_fidelitys():
    first, second = random_features(0, 400, 32), random_features(1, 500, 32, shift=0.3)
    moments = [statistics_of(features, 64).finish() for features in (first, second)]
    ours = frechet_distance(*moments[0], *moments[1])
    (m1, c1), (m2, c2) = (
        (f.double().numpy().mean(0), np.cov(f.double().numpy(), rowvar=False))
        for f in (first, second)
    )
    root = scipy.linalg.sqrtm(c1 @ c2).real
    closed = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert ours == pytest.approx(closed, rel=1e-9)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(f.double()) for f in (first, second)), verbose=False
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Fewer vectors than dimensions, where the root of a product loses half of the digits."""
    wide = torch.zeros(40, 300)
    wide[:, :20] = random_features(0, 40, 20)
    turn = np.linalg.qr(np.random.RandomState(0).randn(300, 300))[0]  # hides the zeros
    moments = []
    for scale in (1.0, 3.0):
        moments.append(statistics_of(wide.double() @ torch.from_numpy(turn) * scale, 8).finish())
    trace = np.trace(moments[0][1])
    mean = moments[0][0]  # the other one's is three times this, its covariance nine times
    assert frechet_distance(*moments[0], *moments[1]) == pytest.approx(
        4 * mean @ mean + trace * (1 + 9 - 2 * 3), rel=1e-10
    )
    same = frechet_distance(*moments[0], *moments[0])
    assert abs(same) < 1e-10 * trace
    nothing = np.zeros((300, 300))
    assert frechet_distance(mean, nothing, mean, nothing) == 0


def scattered(seed, n, width):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def clustered(seed, n, width):
    """Tight clusters, each with copies of one vector: ties, and distances of zero."""
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(10, width, generator=torch.Generator().manual_seed(9))
    which = torch.randint(10, (n,), generator=generator)
    features = centres[which] + 0.01 * torch.randn(n, width, generator=generator)
    features[: n // 10] = centres[which[: n // 10]]
    return features


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("make", [scattered, clustered])
@pytest.mark.parametrize("n, m, block", [(2000, 2000, 700), (257, 130, 64), (90, 200, 1000)])
def test_prdc_equals_the_package_prdc(make, n, m, block, k, capsys):
    real, fake = make(1, n, 64), make(2, m, 64)
    ours = prdc(real, fake, k, block)
    assert ours == reference.compute_prdc(real.numpy(), fake.numpy(), k)
    assert all(0 < value for value in ours.values())


def test_prdc_of_float64_equals_the_package_prdc(capsys):
    real, fake = scattered(1, 200, 16).double(), scattered(2, 150, 16).double()
    assert prdc(real, fake, 3, 64) == reference.compute_prdc(real.numpy(), fake.numpy(), 3)


def test_kth_distances_are_to_the_kth_nearest_other_vector():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert kth_distances(line, 1, block=2).tolist() == [1, 1, 2, 4]
    assert kth_distances(line, 3, block=3).tolist() == [7, 6, 4, 7]
    with pytest.raises(ValueError, match="more vectors"):
        prdc(line, line, 4)
