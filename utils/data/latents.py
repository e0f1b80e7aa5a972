"""The ids of a dataset, encoded once by a trained autoencoder and cached on disk."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from utils.data.cache import Parts, Whole
from utils.training.checkpoints import weights_hash
from utils.data.datasets import Subset
from utils.training.processes import World
from utils.data.batches import UnreadableFiles, evaluation_batches, stream

LATENTS = Path("latents")
PART = 2048  # images that are encoded between one part and the next; a multiple of encode's batch


def latents_key(dataset, autoencoder, flip):
    """Hex digest that changes with the data, its size and channels, the flip and the weights."""
    parts = (dataset.fingerprint(), weights_hash(autoencoder), f"flip {bool(flip)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@torch.no_grad()
def encode(dataset, autoencoder, flip, num_workers, device, progress, batch_size=32):
    """Encode a dataset, mirrored as well when `flip`, which makes two orientations.

    Returns a dict: `ids` int32 [n, orientations, N], and `unreadable`, {path: reason} of the
    images that cannot be read.
    """
    unreadable = UnreadableFiles()
    batches = evaluation_batches(dataset, batch_size, num_workers, device, unreadable, True)
    ids = [torch.empty((0, 0, 0), dtype=torch.int32)]
    for images, _ in batches:
        views = [images, images.flip(-1)] if flip else [images]
        codes = [autoencoder.encode(view)[-1] for view in views]  # each [b, N]
        ids.append(torch.stack(codes, dim=1).to("cpu", torch.int32))
        progress(len(images))
    return {"ids": join(ids), "unreadable": dict(unreadable.reasons)}


def load_latents(
    dataset, autoencoder, flip, num_workers, device, log, world=World(), folder=LATENTS
):
    """Ids int32 [n, orientations, N] of `dataset`, from the cache where it holds just these.

    The file's name and content carry `latents_key`: other data, settings or weights have another.
    An interrupted run goes on after the last part of the dataset that it has encoded, and the
    processes of a world divide the parts among them. Raises UserError where no image can be read.
    """
    key = latents_key(dataset, autoencoder, flip)
    path = Path(folder) / f"{dataset.name}_{key[:16]}.pt"

    def make(first, n, progress):
        part = Subset(dataset, np.arange(first, first + n))
        return encode(part, autoencoder, flip, num_workers, device, progress)

    def path_of(first, n):
        return path.with_suffix(f".part_{first}_{n}")

    def join_parts(parts):
        ids = join([part["ids"] for part in parts])
        if not len(ids):
            raise parts.nothing_readable()
        return {"ids": ids, "unreadable": dict(parts.unreadable.reasons)}

    parts = Parts(len(dataset), PART, make, path_of, key, log, "images to encode", check_ids)
    whole = Whole(path, parts, join_parts, check_ids)
    whole.share(world)
    content = world.first(whole.get)
    log.info(f"{len(content['ids'])} grids of ids in {path}")
    return content["ids"]


def join(ids):
    """Tensors of ids [n, orientations, N] one after another, without those of no image."""
    return torch.cat([part for part in ids if len(part)] or ids[:1])


def check_ids(content):
    """Raise unless a cached dict holds what `encode` gives; its ids are then in memory."""
    ids = content["ids"]
    if ids.dtype != torch.int32 or ids.dim() != 3 or not ids.is_contiguous():
        raise TypeError("its ids are no grids")
    content["ids"], content["unreadable"] = ids.clone(), dict(content["unreadable"])


def latent_batches(ids, batch_size, seed, start_batch, device, share=(0, 1)):
    """Endless iterator of ids int64 [B, N] on `device` from ids [n, orientations, N].

    `share`: see `stream`.
    """
    for indices, flips in stream(len(ids), batch_size, seed, start_batch, share):
        orientation = torch.from_numpy(flips).long() if ids.shape[1] > 1 else 0
        yield ids[torch.from_numpy(indices), orientation].long().to(device)
