"""Images from a trained sampler, in batches."""

import torch
from tqdm import tqdm

from utils.training import seed_step


@torch.no_grad()
def decode(sampler, autoencoder, ids, batch_size=64):
    """Images [n, C, S, S] in [0, 1] of ids [n, N], on the CPU."""
    images = [autoencoder.generator(sampler.embed(part)).cpu() for part in ids.split(batch_size)]
    return torch.cat(images).float().clamp(0, 1)


@torch.no_grad()
def draw_samples(H, sampler, autoencoder, precision):
    """Images [n_samples, C, S, S] in [0, 1], drawn in batches of `batch_size`.

    The noise of each batch is a function of the seed and of the number of its first sample.
    """
    images = []
    with tqdm(total=H.n_samples, desc="sampling", unit="image", dynamic_ncols=True) as bar:
        for first in range(0, H.n_samples, H.batch_size):
            count = min(H.batch_size, H.n_samples - first)
            seed_step(H.seed, first, "samples")
            with precision.autocast():
                ids = sampler.sample(count, H.temp)
            images.append(decode(sampler, autoencoder, ids))
            bar.update(count)
    return torch.cat(images)
