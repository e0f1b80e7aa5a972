"""Nearest neighbours: LPIPS as a distance of vectors, and the running k nearest."""

import lpips
import pytest
import torch

from models.autoencoder.perceptual import PerceptualDistance, lpips_input
from utils.evaluation.neighbours import NearestNeighbours, squared_distances


@pytest.fixture(scope="module")
def perceptual():
    torch.manual_seed(0)
    return PerceptualDistance()


@pytest.mark.filterwarnings("ignore:The parameter", "ignore:Arguments other than")  # from lpips
@pytest.mark.parametrize("channels, size, value_range", [
    (3, (32, 32), "-1_1"), (1, (32, 32), "0_1"), (3, (20, 43), "0_1"),
])
@torch.no_grad()
def test_distances_of_vectors_are_lpips_pair_by_pair(perceptual, channels, size, value_range):
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    reference.load_state_dict(perceptual.state_dict())
    torch.manual_seed(1)
    images = torch.rand(7, channels, *size)
    images[1] = (images[0] + 1e-3 * torch.randn_like(images[0])).clamp(0, 1)  # nearly a copy
    images[2], images[3] = images[0], 0.0  # a copy, and features without a direction
    images = lpips_input(images, value_range)
    assert images.shape[1] == 3
    vectors = perceptual.vectors(images)
    found = squared_distances(vectors[:3], vectors, columns=1000)
    assert found.shape == (3, 7) and found.dtype == torch.float64
    for i in range(3):
        for j in range(7):
            expected = float(reference(images[i : i + 1], images[j : j + 1]))
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert found[0, 1] > 0 and found[0, 2] < 1e-12


def test_heads_with_negative_weights_are_refused(perceptual):
    weight = perceptual.lins[2].model[-1].weight
    kept = weight.clone()
    weight[0, 0] = -1.0
    with pytest.raises(ValueError, match="below 0"):
        perceptual.vectors(torch.rand(1, 3, 16, 16))
    weight.copy_(kept)


@pytest.mark.parametrize("block", [1, 7, 64, 100])
def test_the_nearest_do_not_depend_on_the_blocks(block):
    torch.manual_seed(0)
    vectors, others = torch.rand(5, 30), torch.rand(90, 30)
    others[60] = others[3] = vectors[2]  # equally near: the earlier one comes first
    nearest = NearestNeighbours(vectors, 4)
    for indices in torch.arange(90).split(block):
        nearest.add(others[indices], 1000 + indices)
    distances = torch.cdist(vectors.double(), others.double()).square()
    expected = distances.sort(dim=1, stable=True)
    torch.testing.assert_close(nearest.distances, expected.values[:, :4], atol=1e-12, rtol=1e-9)
    assert torch.equal(nearest.indices, 1000 + expected.indices[:, :4])
    assert nearest.indices[2, :2].tolist() == [1003, 1060]


def test_fewer_images_than_neighbours():
    nearest = NearestNeighbours(torch.zeros(2, 3), 10)
    nearest.add(torch.ones(4, 3), torch.arange(4))
    assert nearest.indices.shape == (2, 4) and (nearest.distances == 3).all()
