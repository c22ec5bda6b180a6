"""Models built from `llmkern.nn`."""

from .gpt import GPT, GPTConfig
from .presets import PRESETS, preset

__all__ = ["GPT", "PRESETS", "GPTConfig", "preset"]
