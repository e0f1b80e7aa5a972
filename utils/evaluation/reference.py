"""Features of real images, computed once and cached in statistics/, or in a file of the user's.

Rank 0 looks whether they are there; if not, all ranks compute them. It alone gets the result, the
others None.
"""

import json
from pathlib import Path

import numpy as np
import torch

from utils.data.batches import UnreadableFiles, warn_of_unreadable
from utils.data.cache import cached, read_cached
from utils.data.split import sample_of
from utils.errors import UserError
from utils.evaluation.features import dataset_stream, stream_features
from utils.evaluation.metrics import FeatureStatistics
from utils.files import HashingWriter, file_hash, make_folder, whole_file

STATISTICS = Path("statistics")


def reference_path(dataset, extractor, key, suffix):
    """Where what is cached of a dataset's features lies."""
    return STATISTICS / f"{dataset.name}_{extractor.facts['extractor']}_{key[:16]}{suffix}"


def real_statistics(run, dataset, extractor):
    """FeatureStatistics of all images of a dataset, under FID's layer."""
    processes, images = run.processes, dataset_stream(dataset, run.H, run.device)
    key, check = extractor.key(images.data, "fid"), FeatureStatistics.from_state
    path = reference_path(dataset, extractor, key, ".pt")

    def compute():
        statistics, unreadable = FeatureStatistics(), UnreadableFiles()
        for chunk in stream_features(images, extractor, processes, unreadable):
            statistics.update(chunk["fid"])
        if processes.is_first:
            return {**statistics.state_dict(), "unreadable": dict(unreadable)}

    content = read_cached(path, key, run.log, check) if processes.is_first else None
    if not processes.broadcast(content is not None):
        computed = compute()
        if processes.is_first:
            content = cached(path, key, lambda: computed, run.log, check)
    if not processes.is_first:
        return None
    missing = content.get("unreadable", {})
    warn_of_unreadable(missing, images.count, images.description, path, run.log)
    statistics = FeatureStatistics.from_state(content)
    run.log.info(f"statistics of {statistics.count} real images in {path}")
    return statistics


def real_features(run, dataset, count, extractor, metric, path=None):
    """Features [n, D] of `count` images of a dataset, always the same ones, or of all where it has
    no more; stored in the .npy file `path` (None: in statistics/)."""
    chosen = sample_of(dataset, count)
    images = dataset_stream(chosen, run.H, run.device)
    key = extractor.key(images.data, metric)
    path = path or reference_path(chosen, extractor, key, ".npy")
    return stored_features(run, images, extractor, metric, key, path)


def stored_features(run, images, extract, metric, key, path):
    """Features float32 [n, D] of an ImageStream that `extract` calls `metric`, from the .npy file
    `path`, or computed and stored there.

    Beside it lies <path>.json with the key and the array's hash: where either differs the features
    are computed again. An array without that file is somebody's own and taken as it is.
    """
    path, record, log = Path(path), record_path(path), run.log
    key = f"{key} {images.count}"
    exists, own = path.exists(), is_own(path)
    is_there = run.processes.broadcast(run.processes.is_first and (
        own or exists and record.read_bytes() == record_of(key, file_hash(path)).encode()
    ))
    chunks = []
    if not is_there:
        features = stream_features(images, extract, run.processes, run.unreadable_files())
        chunks = [chunk[metric] for chunk in features]
    if not run.processes.is_first:
        return None
    if is_there:
        if own:
            log.warning(f"{path} is taken as it is: nothing beside it says what it was made of")
        else:
            log.info(f"features read from {path}")
        return read_array(path)
    if exists:
        log.warning(f"{path} is made again: it belongs to other images or another extractor")
    array = torch.cat(chunks).float()
    make_folder(path.parent)
    with whole_file(path) as file:
        writer = HashingWriter(file)
        np.save(writer, array.numpy(), allow_pickle=False)
        record.write_text(record_of(key, writer.finish()["sha256"]))
    log.info(f"features kept in {path}")
    return array


def record_path(path):
    """Where the record of a .npy file lies."""
    return Path(f"{path}.json")


def is_own(path):
    """Whether a .npy file is somebody's own, without a record beside it."""
    return Path(path).exists() and not record_path(path).exists()


def record_of(key, digest):
    """What stands beside a .npy file: what it was made of, and its hash."""
    return json.dumps({"key": key, "sha256": digest})


def read_array(path):
    """A float tensor [n, D] of a .npy file; UserError where it holds none."""
    try:
        array = torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # a broken or foreign file makes numpy raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no .npy file of features: {reason}") from None
    if array.ndim != 2 or not array.is_floating_point():
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, not features [n, D]")
    if not array.isfinite().all():
        raise UserError(f"{path} holds features that are not finite: compute them again")
    return array
