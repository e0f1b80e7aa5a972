"""Features of images for measures of generated ones: extractors, and features in a stream.

Shapes: images uint8 [b, C, S, S], C = 1 (grey, shown to the extractor as equal channels) or 3;
features float32 [n, D].
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from tqdm import tqdm

from models.autoencoder.perceptual import IMAGENET, lite0_weights
from utils.data.batches import UnreadableFiles, nothing_readable
from utils.data.part_reader import PartReader
from utils.errors import SettingsError, UserError
from utils.files import load_file, weights_hash

PART = 1024  # images of a dataset that a rank computes features of in one turn
NAMES = {  # what torch-fidelity calls them
    "inception": "inception-v3-compat",
    "vgg16": "vgg16",
    "clip": "clip-vit-b-32",
    "dinov2": "dinov2-vit-l-14",
    "efficientnet_lite0": "efficientnet-lite0",
}


# --- extractors --------------------------------------------------------------------------------


class EfficientNetLite0(FeatureExtractorBase):
    """EfficientNet-Lite0 on ImageNet, whose weights an installed package brings.

    Gives `1280`, the pooled output of the last convolution, and `logits` of 1000 classes.
    """

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
        super().__init__(name, features_list)
        self.model = EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(load_file(feature_extractor_weights_path or lite0_weights()))

    @staticmethod
    def get_provided_features_list():
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "1280"

    def forward(self, images):
        x = interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), size=(224, 224), align_corners=False
        )
        mean, std = x.new_tensor(IMAGENET)[..., None, None]
        x = self.model.extract_features((x / 255 - mean) / std)  # [b, 1280, 7, 7]
        pooled = x.mean((2, 3))
        features = {"1280": pooled, "logits": self.model._fc(pooled)}
        return tuple(features[layer] for layer in self.features_list)


if NAMES["efficientnet_lite0"] not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAMES["efficientnet_lite0"], EfficientNetLite0)


class Extractor:
    """The extractor of `--feature_extractor`: images to {metric: features [b, D] on the CPU}, by
    torch-fidelity's layer for each of `metrics`. `facts` tells it from any other."""

    def __init__(self, H, device, metrics):
        name = H.feature_extractor
        kind = FEATURE_EXTRACTORS_REGISTRY[NAMES[name]]
        self.layers = {m: kind.get_default_feature_layer_for_metric(m) for m in metrics}
        layers = sorted(set(self.layers.values()))
        self.network = build_network(kind, name, layers, H.feature_extractor_weights)
        self.network.requires_grad_(False).eval().to(device)
        self.device = device
        self.facts = {
            "extractor": NAMES[name], "weights": weights_hash(self.network),
            "precision": f"float32 on {device.type}",  # GPUs may convolve in TF32
        }

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features = self.network.convert_features_tuple_to_dict(self.network(images))
        return {m: features[layer].cpu().flatten(1) for m, layer in self.layers.items()}

    def key(self, data, *metrics):
        """Hex digest that changes with `data`, which names images, and with what looks at them."""
        parts = json.dumps([data, self.facts, *(self.layers[m] for m in metrics)])
        return hashlib.sha256(parts.encode()).hexdigest()


def build_network(kind, name, layers, weights):
    """torch-fidelity's module for an extractor; UserError where its weights are not to be had."""
    flag = "--feature_extractor_weights"
    if weights and name == "dinov2":
        raise SettingsError(f"dinov2 comes by torch.hub, code and weights together: leave {flag} "
                            f"out, or take another extractor")
    if weights and name != "clip":  # CLIP's file is a program, TorchScript
        load_file(weights)  # torch-fidelity would run code that is hidden in a file
    elif weights and not Path(weights).exists():
        raise UserError(f"{flag}: there is no file {weights}")
    try:
        return kind(NAMES[name], layers, feature_extractor_weights_path=weights, verbose=False)
    except OSError as error:
        raise UserError(f"the weights of {name} do not download ({error}): give a local file with "
                        f"{flag}, or take --feature_extractor efficientnet_lite0, which is "
                        f"installed with its own") from None
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        if not weights:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {weights} is no file of {name}'s weights: {reason}") from None


# --- features in a stream ------------------------------------------------------------------------


@dataclass
class ImageStream:
    """Images that are made or read in chunks, to compute something of each."""

    count: int
    size: int  # of a chunk
    batches: Callable  # (first, n, on_unreadable) -> batches of the n images from `first` on
    data: object  # names the images, for keys of caches
    description: str
    begin: Callable = lambda: None  # called on all ranks before the first chunk

    @property
    def spans(self):
        """The (first, n) of all chunks."""
        return [
            (first, min(self.size, self.count - first)) for first in range(0, self.count, self.size)
        ]


def dataset_stream(dataset, H, device, description="real images"):
    """The ImageStream of a dataset's images, uint8 [b, C, S, S] on the device."""
    reader = PartReader(dataset, PART, H.batch_size, H.num_workers)

    def batches(first, n, on_unreadable):
        return reader.read(first, n, device, on_unreadable)

    return ImageStream(len(dataset), PART, batches, dataset.fingerprint(), description)


def stream_features(images, extract, processes, unreadable):
    """Iterator of what `extract` gives for each chunk of an ImageStream, in order, on rank 0.

    `extract(batch)` is a dict of tensors [b, ...]. All ranks must iterate and take the chunks in
    turn; those above 0 get nothing. Raises UserError where no image can be read, or the ranks have
    different images.
    """
    spans = images.spans
    processes.check_equal(images.data, images.description)
    images.begin()
    with tqdm(
        total=images.count, desc=images.description, unit="image", dynamic_ncols=True,
        disable=not processes.is_first,
    ) as bar:
        for turn in range(0, len(spans), processes.size):
            mine = spans[turn + processes.rank : turn + processes.rank + 1]
            chunk = [features_of_chunk(images, extract, span, bar) for span in mine]
            for features, reasons in sum(processes.gather(chunk) or [], []):
                for path, reason in reasons.items():
                    unreadable(path, reason)
                if features:
                    yield features
            done = min(images.count, (turn + processes.size) * images.size)
            bar.update(done - bar.n)  # what the other ranks have done, or could not read
    if processes.is_first and len(unreadable) == images.count:
        raise nothing_readable(images.count, images.description, unreadable)


def features_of_chunk(images, extract, span, bar):
    """({name: tensor [n, ...]} of one chunk, {path: reason} of its unreadable images)."""
    unreadable, found = UnreadableFiles(), []
    for batch in images.batches(*span, unreadable):
        found.append(extract(batch))
        bar.update(len(batch))
    names = found[0] if found else ()
    return {n: torch.cat([part[n] for part in found]) for n in names}, dict(unreadable)
