"""Measures on features against other people's: numpy, scipy, torch-fidelity, prdc."""

from types import SimpleNamespace

import numpy as np
import prdc as reference
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from utils.errors import UserError
from utils.evaluation.metrics import (
    METRICS, FeatureStatistics, frechet_distance, kth_distances, prdc,
)


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


def test_statistics_of_one_vector_are_kept_and_know_how_many_they_are_of():
    """A folder may have a single readable image, of which the log is to tell."""
    features = random_features(0, 5, 3)
    statistics = statistics_of(features[:1], 1)
    restored = FeatureStatistics.from_state(statistics.state_dict())
    assert len(FeatureStatistics()) == 0 and len(statistics) == len(restored) == 1
    restored.update(features[1:])
    assert len(restored) == 5
    np.testing.assert_allclose(restored.finish()[0], features.double().mean(0).numpy())


def settings(**flags):
    return SimpleNamespace(**{"n_samples": 50, "kid_subset_size": 20, "nearest_k": 3, **flags})


class Log:
    def warning(self, message):
        pass


def figures_of(name, generated, real):
    """What a metric gives for as many images; it must have agreed to them."""
    metric = METRICS[name](settings(), torch.device("cpu"))
    metric.check(generated, real)
    metric.update(random_features(0, generated, 6))
    features = random_features(1, real, 6)
    of_kind = {"statistics": statistics_of(features, 64), "features": features, None: None}
    return metric.finish(of_kind[metric.real], Log())


@pytest.mark.parametrize("name, least, says", [
    ("fid", 2, "FID needs 2 {} images or more, not 1: {}"),
    ("kid", 20, "KID of --kid_subset_size 20 needs 20 {} .*, not 19: {}, or lower --kid_subset"),
    ("isc", 10, "inception score, .* needs 10 {} .*, not 9: {}, or leave --isc out"),
    ("prc", 4, "--prc, with 3 neighbours .* needs 4 {} .*, not 3: {}, or leave --prc out"),
    ("prdc", 4, "PRDC with --nearest_k 3 needs 4 {} .*, not 3: {}, or lower --nearest_k"),
])
def test_a_measure_names_how_many_images_it_needs_and_can_do_with_them(name, least, says):
    assert all(np.isfinite(value) for value in figures_of(name, least, least).values())
    with pytest.raises(UserError, match=says.format("generated", "raise --n_samples")):
        figures_of(name, least - 1, 100)
    metric, more = METRICS[name](settings(), torch.device("cpu")), "add images to the dataset"
    if metric.real:
        with pytest.raises(UserError, match=says.format("real", more)):
            figures_of(name, 100, least - 1)
    metric.check(None, None)  # as long as the numbers are unknown
    metric.H = SimpleNamespace()  # without samples, as where reconstructions are measured
    with pytest.raises(UserError, match=says.format("generated", more)):
        metric.check(least - 1, 100)


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
