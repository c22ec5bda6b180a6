"""Models built from `llmkern.nn`."""

from .build import build, describe
from .gguf import GGUF, GGUFError
from .gpt import GPT, GPTConfig
from .presets import PRESETS, preset
from .pretrained import from_pretrained, save_pretrained

__all__ = [
    "GGUF",
    "GPT",
    "PRESETS",
    "GGUFError",
    "GPTConfig",
    "build",
    "describe",
    "from_pretrained",
    "preset",
    "save_pretrained",
]
