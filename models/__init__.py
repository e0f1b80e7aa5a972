"""The mathematics: tensors in, tensors out."""

from models.autoencoder.vqgan import VQGAN
from models.prior.absorbing_diffusion import AbsorbingDiffusion
from models.prior.attention import FullAttention, HydraNeighborhoodAttention
from models.prior.autoregressive import AutoregressiveTransformer
from models.prior.transformer import Transformer
from models.sampling.samplers import SAMPLERS

__all__ = [
    "SAMPLERS", "VQGAN", "AbsorbingDiffusion", "AutoregressiveTransformer", "FullAttention",
    "HydraNeighborhoodAttention", "Transformer",
]
