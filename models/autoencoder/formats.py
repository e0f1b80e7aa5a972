"""The autoencoder in the number and memory formats in which a device is fast.

Shapes: B images of C channels and side S, h x w grid, D = emb_dim.
"""

import copy

import torch
from torch import nn

from models.autoencoder.autoencoder import VQAutoEncoder, formatted


class HalfNetwork(nn.Module):
    """A frozen `Encoder` or `Generator` whose weights are copied to the 16 bits of `dtype`.

    Takes and returns float32. The last norm and convolution compute in float32: they cost little,
    and 8 bits of mantissa would round images to less than 256 levels.
    """

    def __init__(self, network, dtype):
        super().__init__()
        self.dtype = dtype
        self.body = copy.deepcopy(network.blocks[:-2]).to(dtype)
        self.head = network.blocks[-2:]  # shared, not copied

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = formatted(x.to(self.dtype), self.body)
            return self.head(self.body(x).float())


class HalfAutoEncoder(VQAutoEncoder):
    """What `in_precision` returns; the quantizer is that of `autoencoder`, in float32."""

    def __init__(self, autoencoder, dtype):
        nn.Module.__init__(self)
        self.grid_shape, self.quantize = autoencoder.grid_shape, autoencoder.quantize
        if hasattr(autoencoder, "weights_hash"):
            self.weights_hash = autoencoder.weights_hash  # of the weights in float32
        self.encoder = HalfNetwork(autoencoder.encoder, dtype)
        self.generator = HalfNetwork(autoencoder.generator, dtype)
        self.requires_grad_(False).eval()


def in_precision(autoencoder, dtype):
    """A frozen autoencoder that computes in `dtype`, float32, bfloat16 or float16.

    Under autocast the weights would be cast anew at every call; here they are cast once. `encode`,
    `decode_indices` and `generator` take and return float32 as before, with and without autocast,
    and ids are those nearest in float32. The given autoencoder, which must be frozen and on its
    device, is kept as it is, and is what is returned where `dtype` is float32.
    """
    if dtype == torch.float32:
        return autoencoder
    return HalfAutoEncoder(autoencoder, dtype)


def to_fast_format(vqgan, device):
    """Lay out the weights of a `VQGAN`, or of its autoencoder alone, which activations follow, as
    `device` is fast with them.

    On CUDA all are channels_last, what tensor cores take. On a CPU only those of the perceptual
    distance are: there GroupNorm's backward pass is 5 times slower in channels_last with bfloat16
    and 1.8 times with float32. Training steps on one core of an AMD EPYC (64 pixels, nf 64, batch
    4), all channels_last / only the distance: 0.99 / 0.82 s in bfloat16, 1.42 / 1.37 s in float32.
    Names, shapes and values of the state dict stay. Returns `vqgan`.
    """
    if device.type == "cuda":
        return vqgan.to(memory_format=torch.channels_last)
    if getattr(vqgan, "perceptual", None) is not None:
        vqgan.perceptual.to(memory_format=torch.channels_last)
    return vqgan
