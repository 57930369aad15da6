"""Operations: pure functions of (batch, heads, positions, channels) tensors. They need torch and nothing else."""

from lineara.ops.dispatch import explain_implementation
from lineara.ops.efficient_attention import attend_context, efficient_attention, merge_contexts, summarize_context
from lineara.ops.kernel_attention import kernel_attention
from lineara.ops.multiresolution_attention import multiresolution_attention
from lineara.ops.softmax_attention import softmax_attention

__all__ = [
    "attend_context",
    "efficient_attention",
    "explain_implementation",
    "kernel_attention",
    "merge_contexts",
    "multiresolution_attention",
    "softmax_attention",
    "summarize_context",
]
