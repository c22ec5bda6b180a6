"""Models built from `llmkern.nn`."""

from .build import build, describe
from .gguf import GGUF, GGUFError
from .gpt import GPT, GPTConfig
from .presets import PRESETS, preset

__all__ = ["GGUF", "GPT", "PRESETS", "GGUFError", "GPTConfig", "build", "describe", "preset"]
