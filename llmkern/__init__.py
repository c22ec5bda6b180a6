"""llmkern: get a PyTorch GPT past the hardware wall it hits."""

__version__ = "0.1.0"  # before the rooms, which print it

from . import models, nn, ops, optim
from .compile import backend
from .diagnose import diagnose
from .lora import lora_, merge_lora_, unmerge_lora_
from .ops import empty_cache, set_fallback, use
from .ops.explain import explain
from .plan import plan
from .prove import prove
from .quantize import Int4WeightOnly, Int8WeightOnly, quantize_
from .swap import disable_sdpa, enable_sdpa, restore_, swap_, swapped

__all__ = [
    "Int4WeightOnly",
    "Int8WeightOnly",
    "backend",
    "diagnose",
    "disable_sdpa",
    "empty_cache",
    "enable_sdpa",
    "explain",
    "lora_",
    "merge_lora_",
    "models",
    "nn",
    "ops",
    "optim",
    "plan",
    "prove",
    "quantize_",
    "restore_",
    "set_fallback",
    "swap_",
    "swapped",
    "unmerge_lora_",
    "use",
]
