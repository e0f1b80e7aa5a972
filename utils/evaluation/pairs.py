"""Measures of images and their reconstructions: of each pair, and of all.

Shapes: pairs of images [b, C, S, S] in [0, 1].
"""

import torch

from models.autoencoder.perceptual import SMALLEST, PerceptualDistance, lpips_input
from models.autoencoder.quantizers import codebook_usage
from utils.data.pixels import to_uint8
from utils.evaluation.features import Extractor
from utils.evaluation.metrics import SSIM_WINDOW, FeatureStatistics, frechet_distance, psnr, ssim
from utils.evaluation.reconstruction import ENOUGH, EXTRACTOR
from utils.training.build import efficientnet_distance, lpips_weights
from utils.training.checkpoints import load_weights

CODES = "codes used"


def perceptual_distance(H, path, device):
    """(its name, a function of pairs that gives distances [b]) of the perceptual distance that
    validation measured: LPIPS with the weights in the run's model file `path`, where it was part of
    the loss, else EfficientNet-Lite0's. The function is None where images are too small."""
    lpips = H.perceptual == "lpips" and H.perceptual_weight > 0
    if weights := lpips_weights(path) if lpips else {}:
        name, distance, value_range = "lpips", PerceptualDistance(), H.perceptual_range
        load_weights(distance, weights, path)
    else:
        name, distance, value_range = "efficientnet_lite0", efficientnet_distance(), "0_1"
    if H.img_size < SMALLEST[name]:
        return name, None
    distance.to(device)
    return name, lambda x, y: distance(
        *(lpips_input(images, value_range) for images in (x, y))
    ).flatten()


class PairMeasures:
    """Measures of pairs that come in a stream. `path` is the model's file in the run of H."""

    def __init__(self, H, path, device):
        name, distance = perceptual_distance(H, path, device)
        self.distance, self.perceptual = distance, f"perceptual distance ({name})"
        self.has_ssim, self.codebook_size = H.img_size >= SSIM_WINDOW, H.codebook_size
        self.extract = Extractor(EXTRACTOR, device, ["fid"])
        self.statistics = [FeatureStatistics(), FeatureStatistics()]  # images, reconstructions
        self.values, self.usage = {}, 0

    @property
    def count(self):
        """How many pairs there were."""
        return len(self.statistics[0])

    @torch.no_grad()
    def add(self, images, reconstructions, ids):
        """Add pairs and the ids [b, N] between them; returns {measure: values [b] on the CPU}."""
        values = {"PSNR (dB)": psnr(images, reconstructions)}
        if self.has_ssim:
            values["SSIM"] = ssim(images, reconstructions)
        if self.distance is not None:
            values[self.perceptual] = self.distance(images, reconstructions)
        values = {name: value.double().cpu() for name, value in values.items()}
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value.sum().item()
        for statistics, part in zip(self.statistics, (images, reconstructions)):
            statistics.update(self.extract(to_uint8(part))["fid"])
        self.usage = self.usage + codebook_usage(ids, self.codebook_size)["usage"].cpu()
        return values | {CODES: torch.tensor([len(part.unique()) for part in ids])}

    def figures(self):
        """The measures of all pairs, a dict: means, the Fréchet distance between the features of
        images and of reconstructions (None of fewer than `ENOUGH` pairs), and how many codes they
        use, with the perplexity of their use."""
        distance = None
        if self.count >= ENOUGH:
            images, reconstructions = (statistics.finish() for statistics in self.statistics)
            distance = frechet_distance(*images, *reconstructions)
        frequency = self.usage.double() / self.usage.sum()
        return {
            "images": self.count, **{name: sum_ / self.count for name, sum_ in self.values.items()},
            f"Fréchet distance ({EXTRACTOR.feature_extractor})": distance,
            CODES: int((self.usage > 0).sum()), "codes there are": self.codebook_size,
            "perplexity of codes": torch.special.entr(frequency).sum().exp().item(),
        }
