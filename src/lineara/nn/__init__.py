"""Layers that own weights: they project, reshape, call an operation of `lineara.ops` and project back."""

from lineara.nn.efficient_attention import EfficientAttention
from lineara.nn.encoder_block import EncoderBlock
from lineara.nn.feature_map_attention import EfficientAttention1d, EfficientAttention2d, EfficientAttention3d
from lineara.nn.multiresolution_attention import MultiresolutionAttention, MultiresolutionAttention2d
from lineara.nn.softmax_attention import SoftmaxAttention

AdaMRA = MultiresolutionAttention  # the name of the paper

__all__ = [
    "AdaMRA",
    "EfficientAttention",
    "EfficientAttention1d",
    "EfficientAttention2d",
    "EfficientAttention3d",
    "EncoderBlock",
    "MultiresolutionAttention",
    "MultiresolutionAttention2d",
    "SoftmaxAttention",
]
