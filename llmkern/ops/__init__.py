"""The op table and its functions: `llmkern.ops.attention(q, k, v, is_causal=True)` and so on."""

from .attention import attention, attention_varlen
from .decode import decode_attention
from .dispatch import FallbackError, FallbackWarning, implementations, set_fallback, use
from .dropout import dropout
from .embedding import embedding
from .ffn import ffn
from .linear import linear
from .linear_loss import linear_cross_entropy
from .loss import cross_entropy
from .memory import cached_bytes, empty_cache
from .norm import layer_norm, rms_norm
from .op import OPS
from .optim import adamw, grad_norm
from .quant import quant_linear
from .quant_weight import QuantWeight, dequantize, quantize
from .rope import rope, rope_
from .rope_table import rope_frequencies, rope_table
from .softmax import log_softmax, softmax

__all__ = [
    "OPS",
    "FallbackError",
    "FallbackWarning",
    "QuantWeight",
    "adamw",
    "attention",
    "attention_varlen",
    "cached_bytes",
    "cross_entropy",
    "decode_attention",
    "dequantize",
    "dropout",
    "embedding",
    "empty_cache",
    "ffn",
    "grad_norm",
    "implementations",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "quant_linear",
    "quantize",
    "rms_norm",
    "rope",
    "rope_",
    "rope_frequencies",
    "rope_table",
    "set_fallback",
    "softmax",
    "use",
]
