"""How far are reconstructions from their images? The Fréchet distance of a stream of pairs."""

from types import SimpleNamespace

import torch

from utils.data.pixels import to_uint8
from utils.evaluation.features import Extractor
from utils.evaluation.metrics import frechet_distance_of_features

ENOUGH = 64  # pairs, without which a Fréchet distance says little
ENOUGH_TO_COMPARE = 16  # pairs, without which it does not even compare steps of one run
EXTRACTOR = SimpleNamespace(feature_extractor="efficientnet_lite0", feature_extractor_weights=None)


class ReconstructionDistance:
    """The Fréchet distance between the features of images and of their reconstructions, for the
    same images again and again; features are those of the extractor that is installed."""

    def __init__(self, device):
        self.device, self.extract = device, None
        self.of_images, self.features = None, {"images": [], "reconstructions": []}

    def add(self, images, reconstructions):
        """Add pairs [b, C, S, S] in [0, 1]."""
        if self.extract is None:
            self.extract = Extractor(EXTRACTOR, self.device, ["fid"])
        parts = {"reconstructions": reconstructions}
        if self.of_images is None:
            parts["images"] = images
        for name, part in parts.items():
            self.features[name].append(self.extract(to_uint8(part))["fid"])

    def take(self):
        """{"frechet": the distance of all pairs since the last call}; {} of fewer than two."""
        found = {name: torch.cat(parts) for name, parts in self.features.items() if parts}
        self.features = {"images": [], "reconstructions": []}
        if self.of_images is None:
            self.of_images = found["images"]
        if len(self.of_images) < 2:
            return {}
        distance = frechet_distance_of_features(self.of_images, found["reconstructions"])
        return {"frechet": distance}
