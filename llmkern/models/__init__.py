"""Models built from `llmkern.nn`."""

from .bert import BERT, BERTConfig
from .build import build, describe
from .causal import CausalLM
from .classifier import Classifier, ClassifierConfig
from .gguf import GGUF, GGUFError
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .llama_gguf import load_gguf
from .llama_presets import LLAMA_PRESETS
from .presets import PRESETS, preset
from .pretrained import from_pretrained, save_pretrained

__all__ = [
    "BERT",
    "GGUF",
    "GPT",
    "LLAMA_PRESETS",
    "PRESETS",
    "BERTConfig",
    "CausalLM",
    "Classifier",
    "ClassifierConfig",
    "GGUFError",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "build",
    "describe",
    "from_pretrained",
    "load_gguf",
    "preset",
    "save_pretrained",
]
