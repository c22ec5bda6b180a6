"""Models to plain values and back, for checkpoints."""

import dataclasses
from typing import Any

from torch import nn

from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig

# name -> model, its config
KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "GPT": (GPT, GPTConfig),
    "Llama": (Llama, LlamaConfig),
    "BERT": (BERT, BERTConfig),
}


def describe(model: nn.Module) -> dict[str, Any]:
    """Kind and configuration of one of our models; `build` reads it."""
    kind = next((kind for kind, (cls, _) in KINDS.items() if isinstance(model, cls)), None)
    if kind is None:
        known = ", ".join(KINDS)
        raise ValueError(f"describe: the model is a {type(model).__name__}, expected one of {known}")
    return {"kind": kind, "config": dataclasses.asdict(model.config)}


def build(description: dict[str, Any], kernels: bool = True) -> nn.Module:
    """A new model of that description, with fresh weights; a GPT without `kernels` is PyTorch alone.

    Raises:
        ValueError: an unknown kind.
    """
    if description["kind"] not in KINDS:
        raise ValueError(f"build: kind is {description['kind']!r}, expected one of {', '.join(KINDS)}")
    model, config = KINDS[description["kind"]]
    options = {} if kernels else {"kernels": False}
    return model(config(**description["config"]), **options)
