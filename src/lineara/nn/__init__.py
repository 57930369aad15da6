"""Layers that own weights: they project, reshape, call an operation of `lineara.ops` and project back."""

from lineara.nn.efficient_attention import EfficientAttention
from lineara.nn.encoder_block import EncoderBlock
from lineara.nn.feature_map_attention import EfficientAttention1d, EfficientAttention2d, EfficientAttention3d
from lineara.nn.softmax_attention import SoftmaxAttention

__all__ = [
    "EfficientAttention",
    "EfficientAttention1d",
    "EfficientAttention2d",
    "EfficientAttention3d",
    "EncoderBlock",
    "SoftmaxAttention",
]
