"""The ids of a dataset, encoded once by a trained autoencoder and cached on disk."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hparams.errors import UserError
from hparams.files import remove_leftovers
from utils.checkpoints import load_file, save_file, weights_hash
from utils.data import Subset
from utils.loading import UnreadableFiles, evaluation_batches, stream

LATENTS = Path("latents")
PART = 1 << 14  # images after whose encoding their ids are kept: a multiple of encode's batch


def latents_key(dataset, autoencoder, flip):
    """Hex digest that changes with the data, its size and channels, the flip and the weights."""
    parts = (dataset.fingerprint(), weights_hash(autoencoder), f"flip {bool(flip)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@torch.no_grad()
def encode(dataset, autoencoder, flip, num_workers, device, log, batch_size=32):
    """Encode a dataset, mirrored as well when `flip`, which makes two orientations.

    Returns (ids int32 [n, orientations, N], {path: reason} of the images that cannot be read).
    """
    unreadable = UnreadableFiles(lambda path, reason: log.warning(f"passed over {path}: {reason}"))
    batches = evaluation_batches(dataset, batch_size, num_workers, device, unreadable)
    ids = []
    with tqdm(total=len(dataset), desc="encoding", unit="image", dynamic_ncols=True) as bar:
        for images, _ in batches:
            views = [images, images.flip(-1)] if flip else [images]
            codes = [autoencoder.encode(view)[-1] for view in views]  # each [b, N]
            ids.append(torch.stack(codes, dim=1).to("cpu", torch.int32))
            bar.update(len(images))
    return torch.cat(ids), dict(unreadable.reasons)


def load_latents(dataset, autoencoder, flip, num_workers, device, log, folder=LATENTS):
    """Ids int32 [n, orientations, N] of `dataset`, from the cache where it holds just these.

    The file's name and content carry `latents_key`: other data, settings or weights have another.
    """
    key = latents_key(dataset, autoencoder, flip)
    path = Path(folder) / f"{dataset.name}_{key[:16]}.pt"
    if path.exists():
        try:
            ids, unreadable = read_cache(path, key)
            log.info(f"{len(ids)} grids of ids from {path}")
            report_unreadable(unreadable, dataset, log)
            return ids
        except UserError as error:
            log.warning(f"{path} is encoded again: {error}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    parts, ids, unreadable = [], [], {}
    for first in range(0, len(dataset), PART):
        part = Subset(dataset, np.arange(first, min(first + PART, len(dataset))))
        parts.append(path.with_suffix(f".part_{first}"))
        part_ids, reasons = load_part(
            part, parts[-1], key, autoencoder, flip, num_workers, device, log
        )
        ids.append(part_ids)
        unreadable |= reasons
    ids = torch.cat(ids)
    save_file({"key": key, "ids": ids, "unreadable": unreadable}, path)
    for part in parts:
        part.unlink()
    log.info(f"{len(ids)} grids of ids encoded into {path}")
    report_unreadable(unreadable, dataset, log)
    return ids


def load_part(part, path, key, *how):
    """(ids, unreadable) of a part of a dataset, from `path` where an interrupted run left it."""
    try:
        return read_cache(path, key)
    except UserError:
        ids, unreadable = encode(part, *how)
        save_file({"key": key, "ids": ids, "unreadable": unreadable}, path)
        return ids, unreadable


def read_cache(path, key):
    """(ids, unreadable) of a file of cached ids; UserError where it is none, or has another key."""
    content = load_file(path)
    try:
        if content["key"] != key:
            raise UserError("it belongs to other data")
        ids, unreadable = content["ids"], dict(content["unreadable"])
        if ids.dtype != torch.int32 or ids.dim() != 3 or not ids.is_contiguous():
            raise TypeError("its ids are no grids")
        return ids.clone(), unreadable
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"it is no file of cached ids ({error})") from None


def report_unreadable(unreadable, dataset, log):
    """Say how many images have no ids because they could not be read."""
    if unreadable:
        log.warning(f"{len(unreadable)} of {len(dataset)} images could not be read")


def latent_batches(ids, batch_size, seed, start_batch, device, share=(0, 1)):
    """Endless iterator of ids int64 [B, N] on `device` from ids [n, orientations, N].

    `share`: see `stream`.
    """
    for indices, flips in stream(len(ids), batch_size, seed, start_batch, share):
        orientation = torch.from_numpy(flips).long() if ids.shape[1] > 1 else 0
        yield ids[torch.from_numpy(indices), orientation].long().to(device)
