"""The op table and its functions: `llmkern.ops.attention(q, k, v, is_causal=True)` and so on."""

from .attention import attention
from .dispatch import FallbackError, FallbackWarning, implementations, set_fallback, use
from .dropout import dropout
from .embedding import embedding
from .ffn import ffn
from .loss import cross_entropy
from .norm import layer_norm, rms_norm
from .op import OPS
from .rope import rope, rope_
from .rope_table import rope_frequencies, rope_table
from .softmax import log_softmax, softmax

__all__ = [
    "OPS",
    "FallbackError",
    "FallbackWarning",
    "attention",
    "cross_entropy",
    "dropout",
    "embedding",
    "ffn",
    "implementations",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "rope",
    "rope_",
    "rope_frequencies",
    "rope_table",
    "set_fallback",
    "softmax",
    "use",
]
