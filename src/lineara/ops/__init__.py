"""Operations: pure functions of (batch, heads, positions, channels) tensors. They need torch and nothing else."""

from lineara.ops.dispatch import explain_implementation
from lineara.ops.efficient.api import attend_context, efficient_attention, merge_contexts, summarize_context
from lineara.ops.kernel.api import kernel_attention
from lineara.ops.multiresolution.api import multiresolution_attention
from lineara.ops.softmax.api import softmax_attention

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
