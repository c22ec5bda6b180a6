"""The op table and its functions: `llmkern.ops.attention(q, k, v, is_causal=True)` and so on."""

from .attention import attention
from .dispatch import FallbackError, FallbackWarning, implementations, set_fallback, use
from .ffn import ffn
from .loss import cross_entropy
from .norm import layer_norm, rms_norm
from .op import OPS
from .rope import rope, rope_
from .rope_table import rope_frequencies, rope_table

__all__ = [
    "OPS",
    "FallbackError",
    "FallbackWarning",
    "attention",
    "cross_entropy",
    "ffn",
    "implementations",
    "layer_norm",
    "rms_norm",
    "rope",
    "rope_",
    "rope_frequencies",
    "rope_table",
    "set_fallback",
    "use",
]
