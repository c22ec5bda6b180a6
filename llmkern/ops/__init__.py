"""The op table and its functions: `llmkern.ops.attention(q, k, v, is_causal=True)` and so on."""

from .attention import attention
from .decode import decode_attention
from .dispatch import FallbackError, FallbackWarning, implementations, set_fallback, use
from .ffn import ffn
from .loss import cross_entropy
from .norm import layer_norm, rms_norm
from .op import OPS

__all__ = [
    "OPS",
    "FallbackError",
    "FallbackWarning",
    "attention",
    "cross_entropy",
    "decode_attention",
    "ffn",
    "implementations",
    "layer_norm",
    "rms_norm",
    "set_fallback",
    "use",
]
