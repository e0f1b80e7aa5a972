"""The ids of a dataset, encoded once by a trained autoencoder and cached on disk."""

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from utils.checkpoints import cached, weights_hash
from utils.loading import UnreadableFiles, evaluation_batches, stream

LATENTS = Path("latents")


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

    def make():
        ids, unreadable = encode(dataset, autoencoder, flip, num_workers, device, log)
        return {"ids": ids, "unreadable": unreadable}

    content = cached(path, key, make, log)
    log.info(f"{len(content['ids'])} grids of ids in {path}")
    report_unreadable(content["unreadable"], dataset, log)
    return content["ids"]


def report_unreadable(unreadable, dataset, log):
    """Say how many images have no ids because they could not be read."""
    if unreadable:
        log.warning(f"{len(unreadable)} of {len(dataset)} images could not be read")


def latent_batches(ids, batch_size, seed, start_batch, device):
    """Endless iterator of ids int64 [B, N] on `device` from ids [n, orientations, N]."""
    for indices, flips in stream(len(ids), batch_size, seed, start_batch):
        orientation = torch.from_numpy(flips).long() if ids.shape[1] > 1 else 0
        yield ids[torch.from_numpy(indices), orientation].long().to(device)
