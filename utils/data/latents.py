"""The ids of a dataset, encoded once by a trained autoencoder and cached in latents/."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from models.devices import to_device
from utils.data.batches import UnreadableFiles, nothing_readable, stream, warn_of_unreadable
from utils.data.cache import Parts, cached, read_cached
from utils.data.device import bytes_of_image, free_memory, number_that_fits
from utils.data.part_reader import PartReader
from utils.data.pixels import to_float

LATENTS = Path("latents")
PART = 2048  # images of a part that is stored; a multiple of ENCODED
ENCODED = 32  # images encoded together on a CPU


def latents_key(dataset, autoencoder, flip, device):
    """Hex digest that changes with the data, its size and channels, the flip, the weights, and the
    arithmetic: on another kind of device a vector between two codes may get the other one."""
    parts = (dataset.fingerprint(), autoencoder.weights_hash, f"flip {bool(flip)}",
             f"float32 on {device.type}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def encoded_together(dataset, autoencoder, device):
    """How many images are encoded together: ENCODED on a CPU, on a GPU as many as fit, up to 256,
    which divides PART."""
    if device.type == "cpu":
        return ENCODED
    each = bytes_of_image(autoencoder.encoder, dataset.img_size**2)
    return number_that_fits(device, each, ENCODED, 8 * ENCODED)


@torch.no_grad()
def encode(batches, autoencoder, flip, progress):
    """Encode batches of images uint8 [b, C, S, S], mirrored as well when `flip`, which makes two
    orientations: ids int32 [n, orientations, N].

    In float32 with --amp too: in bfloat16 2.3% of a photograph's ids become those of others.
    """
    ids = [torch.empty((0, 0, 0), dtype=torch.int32)]
    for pixels in batches:
        images = to_float(pixels)
        views = [images, images.flip(-1)] if flip else [images]
        views = [autoencoder.encode(view)[-1] for view in views]  # each [b, N]
        ids.append(torch.stack(views, dim=1).to("cpu", torch.int32))
        progress(len(images))
    return concatenate(ids)


def load_latents(dataset, autoencoder, H, flip, processes, log):
    """Ids int32 [n, orientations, N] of `dataset`, from the cache where it holds just these.

    An interrupted run goes on after the last part that it has encoded, and the ranks divide the
    parts among them. Raises UserError where no image can be read.
    """
    key = latents_key(dataset, autoencoder, flip, processes.device)
    path, device = LATENTS / f"{dataset.name}_{key[:16]}.pt", processes.device
    together = encoded_together(dataset, autoencoder, device)
    reader = PartReader(dataset, PART, together, H.num_workers)

    def make(first, n, progress):
        unreadable = UnreadableFiles()
        batches = reader.read(first, n, device, unreadable)
        ids = encode(batches, autoencoder, flip, progress)
        return {"ids": ids, "unreadable": dict(unreadable)}

    def concatenated():
        ids, unreadable = [], {}
        for part in parts:
            ids.append(part["ids"])
            unreadable |= part["unreadable"]
        ids = concatenate(ids)
        if not len(ids):
            raise nothing_readable(len(dataset), f"images of {dataset.name}", unreadable)
        return {"ids": ids, "unreadable": unreadable}

    parts = Parts(
        len(dataset), PART, make, lambda first, n: path.with_suffix(f".part_{first}_{n}"), key,
        log, "images to encode", check_ids,
    )
    processes.check_equal(key, parts.description)
    content = read_cached(path, key, log, check_ids) if processes.is_first else None
    if not processes.broadcast(content is not None):
        parts.divide(processes)
    if not processes.is_first:
        processes.wait()  # until rank 0 has written the file
    content = content or cached(path, key, concatenated, log, check_ids)
    if processes.is_first:
        for part in parts.paths.values():
            part.unlink(missing_ok=True)
        processes.wait()
    warn_of_unreadable(content["unreadable"], parts.count, parts.description, path, log)
    log.info(f"{len(content['ids'])} grids of ids in {path}")
    return content["ids"]


def concatenate(ids):
    """Tensors of ids [n, orientations, N] one after another, without those of no image."""
    return torch.cat([part for part in ids if len(part)] or ids[:1])


def check_ids(content):
    """Raise unless a cached dict holds what `encode` gives; its ids are then in memory."""
    ids = content["ids"]
    if ids.dtype != torch.int32 or ids.dim() != 3 or not ids.is_contiguous():
        raise TypeError("its ids are no grids")
    content["ids"], content["unreadable"] = ids.clone(), dict(content["unreadable"])


def latent_batches(ids, H, start, processes):
    """Endless iterator of this rank's batches int64 [B, N] of ids [n, orientations, N] from batch
    number `start` on, on its device; no batch waits for a GPU.

    The ids are copied to a GPU where they take a quarter of its free memory at most.
    """
    device, part = processes.device, (processes.rank, processes.size)
    resident = device.type == "cuda" and ids.nbytes <= free_memory(device) / 4
    if resident:
        ids = ids.to(device)
    for indices, flips in stream(len(ids), H.batch_size, H.seed, start, part):
        place = device if resident else torch.device("cpu")
        at = to_device(indices, place)
        orientation = to_device(flips.astype(np.int64), place) if ids.shape[1] > 1 else 0
        batch = ids[at, orientation].long()
        yield batch if resident else to_device(batch.numpy(), device)
