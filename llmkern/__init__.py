"""llmkern: get a PyTorch GPT past the hardware wall it hits."""

from . import models, nn, ops, optim
from .ops import empty_cache, set_fallback, use
from .ops.explain import explain
from .plan import plan
from .quantize import Int4WeightOnly, Int8WeightOnly, quantize_
from .swap import disable_sdpa, enable_sdpa, restore_, swap_, swapped

__all__ = [
    "Int4WeightOnly",
    "Int8WeightOnly",
    "disable_sdpa",
    "empty_cache",
    "enable_sdpa",
    "explain",
    "models",
    "nn",
    "ops",
    "optim",
    "plan",
    "quantize_",
    "restore_",
    "set_fallback",
    "swap_",
    "swapped",
    "use",
]

__version__ = "0.1.0"
