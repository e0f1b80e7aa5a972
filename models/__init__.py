"""The mathematics: tensors in, tensors out."""

from models.prior.absorbing_diffusion import AbsorbingDiffusion
from models.prior.attention import FullAttention, HydraNeighborhoodAttention
from models.prior.autoregressive import AutoregressiveTransformer
from models.prior.transformer import Transformer
from models.autoencoder.vqgan import VQGAN

__all__ = [
    "AbsorbingDiffusion",
    "AutoregressiveTransformer",
    "FullAttention",
    "HydraNeighborhoodAttention",
    "Transformer",
    "VQGAN",
]
