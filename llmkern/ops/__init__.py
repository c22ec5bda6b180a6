"""The op table and its functions: `llmkern.ops.attention(q, k, v, is_causal=True)` and so on."""

from .attention import attention
from .decode import decode_attention
from .dispatch import FallbackError, FallbackWarning, implementations, set_fallback, use
from .ffn import ffn
from .linear import linear
from .linear_loss import linear_cross_entropy
from .loss import cross_entropy
from .memory import cached_bytes, empty_cache
from .norm import layer_norm, rms_norm
from .op import OPS

__all__ = [
    "OPS",
    "FallbackError",
    "FallbackWarning",
    "attention",
    "cached_bytes",
    "cross_entropy",
    "decode_attention",
    "empty_cache",
    "ffn",
    "implementations",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "set_fallback",
    "use",
]
