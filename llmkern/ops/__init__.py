"""The op table and its functions: `llmkern.ops.attention(q, k, v, is_causal=True)` and so on."""

from .attention import attention
from .dispatch import FallbackError, FallbackWarning, implementations, set_fallback, use
from .ffn import ffn
from .loss import cross_entropy
from .norm import layer_norm, rms_norm
from .op import OPS
from .optim import adamw

__all__ = [
    "OPS",
    "FallbackError",
    "FallbackWarning",
    "adamw",
    "attention",
    "cross_entropy",
    "ffn",
    "implementations",
    "layer_norm",
    "rms_norm",
    "set_fallback",
    "use",
]
