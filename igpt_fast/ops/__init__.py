"""What a user calls: every op of Image GPT, served by the best backend that can, else by its reference."""

from igpt_fast.ops import attention_compiled as attention_compiled  # registers what torch.compile calls
from igpt_fast.ops.activation import bias_quick_gelu
from igpt_fast.ops.attention import attention, attention_packed
from igpt_fast.ops.attention_decode import attention_decode, cache_append
from igpt_fast.ops.attention_dropout import attention_dropout
from igpt_fast.ops.cross_entropy import cross_entropy
from igpt_fast.ops.decode_step import decode_step
from igpt_fast.ops.dropout import dropout
from igpt_fast.ops.linear import linear
from igpt_fast.ops.linear_cross_entropy import linear_cross_entropy
from igpt_fast.ops.norm import rms_norm
from igpt_fast.ops.palette import color_histogram, kmeans_step, palette_assign, palette_decode
from igpt_fast.ops.projection import projection
from igpt_fast.ops.sampling import sample_tokens

__all__ = [
    "attention",
    "attention_decode",
    "attention_dropout",
    "attention_packed",
    "bias_quick_gelu",
    "cache_append",
    "color_histogram",
    "cross_entropy",
    "decode_step",
    "dropout",
    "kmeans_step",
    "linear",
    "linear_cross_entropy",
    "palette_assign",
    "palette_decode",
    "projection",
    "rms_norm",
    "sample_tokens",
]
