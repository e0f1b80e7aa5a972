"""The ids of a dataset, encoded once by a trained autoencoder and cached on disk."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hparams.files import remove_leftovers
from utils.checkpoints import cached, weights_hash
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

    Returns a dict: `ids` int32 [n, orientations, N], and `unreadable`, {path: reason} of the
    images that cannot be read.
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
    return {"ids": torch.cat(ids), "unreadable": dict(unreadable.reasons)}


def load_latents(dataset, autoencoder, flip, num_workers, device, log, folder=LATENTS):
    """Ids int32 [n, orientations, N] of `dataset`, from the cache where it holds just these.

    The file's name and content carry `latents_key`: other data, settings or weights have another.
    """
    key = latents_key(dataset, autoencoder, flip)
    path = Path(folder) / f"{dataset.name}_{key[:16]}.pt"
    how = autoencoder, flip, num_workers, device, log
    content = cached(path, key, lambda: encode_in_parts(dataset, path, key, *how), log, check_ids)
    for part in path.parent.glob(f"{path.stem}.part_*"):
        part.unlink(missing_ok=True)
    log.info(f"{len(content['ids'])} grids of ids in {path}")
    report_unreadable(content["unreadable"], dataset, log)
    return content["ids"]


def encode_in_parts(dataset, path, key, *how):
    """What `encode` gives for a dataset, a dict of `ids` and `unreadable`.

    Each part is kept beside `path` once it is encoded: an interrupted run goes on after the last.
    """
    remove_leftovers(path.parent)
    ids, unreadable, log = [], {}, how[-1]
    for first in range(0, len(dataset), PART):
        part = Subset(dataset, np.arange(first, min(first + PART, len(dataset))))
        kept = path.with_suffix(f".part_{first}")
        content = cached(kept, key, lambda: encode(part, *how), log, check_ids)
        ids.append(content["ids"])
        unreadable |= content["unreadable"]
    return {"ids": torch.cat(ids), "unreadable": unreadable}


def check_ids(content):
    """Raise unless a cached dict holds what `encode` gives; its ids are then in memory."""
    ids = content["ids"]
    if ids.dtype != torch.int32 or ids.dim() != 3 or not ids.is_contiguous():
        raise TypeError("its ids are no grids")
    content["ids"], content["unreadable"] = ids.clone(), dict(content["unreadable"])


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
