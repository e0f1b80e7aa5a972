"""The mathematics: tensors in, tensors out."""

from models.absorbing_diffusion import AbsorbingDiffusion
from models.attention import FullAttention, HydraNeighborhoodAttention
from models.autoregressive import AutoregressiveTransformer
from models.transformer import Transformer
from models.vqgan import VQGAN

__all__ = [
    "AbsorbingDiffusion",
    "AutoregressiveTransformer",
    "FullAttention",
    "HydraNeighborhoodAttention",
    "Transformer",
    "VQGAN",
]
