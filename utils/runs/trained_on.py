"""Which images a run was trained on, and which are held out: kept with every checkpoint.

What a split is says utils/data/split.py.
"""

from pathlib import Path

import numpy as np

from hparams.parser import read_settings
from utils.data.split import Subset, describe, is_held_out, is_same_data, new_split, sides
from utils.errors import UserError
from utils.runs.folder import RunFolder
from utils.runs.manifest import place_of, read_stats

FACTS = {"by", "dataset", "root", "trained_on", "held_out", "examples"}


def split_of(run, step, log):
    """The split (see utils/data/split.py) that a checkpoint of a run was trained with; None where
    it is not recorded. Earlier versions recorded only whether there was one.

    `run` is its name or its RunFolder.
    """
    folder = RunFolder(run) if isinstance(run, str) else run
    stats = read_stats(folder, step, log)
    split = stats.get("split")
    if isinstance(split, dict) and FACTS <= split.keys():
        return split
    if not folder.hparams.exists():
        return None
    settings = read_settings(folder.hparams)
    path, by = settings.get("custom_dataset_path"), settings.get("steps_per_eval")
    root = str(Path(path).resolve()) if path else settings.get("dataset")
    return {"by": "order" if by else None, "dataset": settings.get("dataset"), "root": root,
            "trained_on": 0, "held_out": 0, "examples": []}


def choose_split(H, dataset, log, autoencoder=False):
    """The rule by which this training holds images out (see utils/data/split.py): that of the run
    it goes on from, for a sampler that of its `autoencoder`, else a new one.

    Raises UserError where the run was trained on all of them.
    """
    if not H.steps_per_eval:
        return {"by": None}
    seen_before = {}  # where the weights may have seen what this run holds out
    if H.load_step:
        split = split_of(H.load_dir, H.load_step, log)
        known = split is not None and is_same_data(dataset, split)
        if known and split["by"] is None:
            raise UserError(f"{H.load_dir} was trained on all images of {dataset.name}, so none "
                            f"can be held out: leave --steps_per_eval 0")
        if is_held_out(dataset, split) is None:
            change = (f"images of {dataset.name} may have come or gone since {H.load_dir} was "
                      f"trained: " if known else "")
            log.warning(f"{change}what this run holds out may be among what {H.load_dir} was "
                        f"trained on ({describe(split)})")
            seen_before = {"seen_before": True}
        if known:
            return {**rule_of(split), **seen_before}
    if autoencoder:
        split = split_of(H.ae_load_dir, H.ae_load_step, log)
        if split is not None and is_same_data(dataset, split):
            if split["by"] is not None:
                return {**rule_of(split), **seen_before}
            log.warning(f"{H.ae_load_dir} was trained on all images of {dataset.name}, on those "
                        f"too that this run holds out")
    return {**new_split(dataset), **seen_before}


def rule_of(split):
    """The rule of a split, without what it says of the images that there were."""
    return {name: split[name] for name in ("by", "share") if name in split}


def is_of_other_images(H, dataset, log):
    """Whether the autoencoder of `--ae_load_dir` is known to be trained on another dataset; the log
    then names both."""
    split = split_of(H.ae_load_dir, H.ae_load_step, log)
    if split is None or is_same_data(dataset, split):
        return False
    log.warning(f"the autoencoder {H.ae_load_dir} was {describe(split)}, this sampler learns from "
                f"{dataset.root_name}")
    return True


def note_training(path, step, name, dataset, log):
    """The split of the checkpoint that the model file `path` belongs to; the log says what it is,
    and warns where a `dataset` that is measured with is another one."""
    split = split_of(place_of(path)[0], step, log)
    log.info(f"{name}: {describe(split)}")
    if dataset is not None and split is not None and not is_same_data(dataset, split):
        log.warning(f"the {name} was not trained on what it is compared with, {dataset.root_name}")
    return split


def images_held_out(H, dataset, log):
    """(the other images, those that neither the sampler of `--load_dir` nor its autoencoder was
    trained on, {run: `is_held_out`}), for an experiment that measures on such images.

    The log says what the runs were trained on, and warns where the images may be among it. Raises
    UserError where no image is held out by both.
    """
    runs = {H.ae_load_dir: H.ae_load_step, H.load_dir: H.load_step}
    splits = {run: split_of(run, step, log) for run, step in runs.items()}
    held_out, rules = {}, []
    for run, split in splits.items():
        held_out[run] = is_held_out(dataset, split)
        if held_out[run]:
            rules.append(sides(dataset, split))
        else:
            log.warning(f"{run} may have been trained on the validation images too "
                        f"({describe(split)}): then figures of them are better than those of new "
                        f"images")
    both = np.logical_and.reduce(rules or [sides(dataset, new_split(dataset))])
    if not both.any():
        raise UserError(f"no image of {dataset.name} is held out by both {' and '.join(runs)}")
    return Subset(dataset, np.flatnonzero(~both)), Subset(dataset, np.flatnonzero(both)), held_out


def images_trained_on(H, dataset, log):
    """The images of a dataset that the sampler of `--load_dir` was trained on, as far as is
    recorded, else all; the log says which."""
    split = split_of(H.load_dir, H.load_step, log)
    log.info(f"{H.load_dir}: {describe(split)}")
    held_out = np.zeros(len(dataset), dtype=bool)
    if is_held_out(dataset, split):
        held_out = sides(dataset, split)
    return Subset(dataset, np.flatnonzero(~held_out))
