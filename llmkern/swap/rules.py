"""Which of torch's classes, and of `llmkern.nn.plain`, become which of `llmkern.nn`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .. import nn as kernel_nn
from ..nn import plain
from ..nn.ffn import looks_like_ffn, parts, why_unfused
from ..nn.kernel_class import class_of
from ..ops.attention import MAX_HEAD_DIM


class Rule(NamedTuple):
    """How one class is swapped.

    Attributes:
        kind: the argument of `swap_` that turns it off.
        was: the class to look for, exactly.
        now: its subclass to put in.
        refuse: why a module of class `was` has to be left alone, or None.
        note: what torch will still compute in it, or None.
        concerns: whether a module of class `was` is one at all (for classes used for many things).
        absorbs: whether its kernel does the work of its linears, which then stay as they are.
    """

    kind: str
    was: type[nn.Module]
    now: type[nn.Module]
    refuse: Callable[[nn.Module], str | None] = lambda module: None
    note: Callable[[nn.Module], str | None] = lambda module: None
    concerns: Callable[[nn.Module], bool] = lambda module: True
    absorbs: bool = False


def _refuse_attention(module: nn.Module) -> str | None:
    if module.head_dim <= MAX_HEAD_DIM:
        return None
    return f"its head dim is {module.head_dim}, the kernels take 1 to {MAX_HEAD_DIM}"


def refuse_linear(module: nn.Module) -> str | None:
    """On a GPU torch's matrix product stays."""
    device = module.weight.device.type
    return None if device == "cpu" else f"it is on {device}, where torch's own matrix product is at the limit"


def _of_a_user(module: nn.Linear) -> bool:
    """Not one whose owner reads its weight without calling it, nor one of ours in 8 bits or with LoRA."""
    inner = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return not inner and not class_of(module).__module__.startswith("llmkern.")


def _refuse_k_dimensions(module: nn.Module) -> str | None:
    return f"its loss is in K dimensions, {module.out_features}" if module.out_features else None


def _refuse_sequential(module: nn.Sequential) -> str | None:
    first, activation, _, last, _ = parts(module)
    return why_unfused(activation, None, first, last)


def _note_encoder(module: nn.TransformerEncoderLayer) -> str | None:
    unfused = why_unfused(module.activation, None, module.linear1, module.linear2)
    return f"torch computes the feed-forward because {unfused}" if unfused else None


RULES = [
    Rule("norm", nn.LayerNorm, kernel_nn.LayerNorm),
    Rule("norm", nn.RMSNorm, kernel_nn.RMSNorm),
    Rule("norm", plain.Block, kernel_nn.Block),
    Rule("ffn", plain.MLP, kernel_nn.MLP, absorbs=True),
    Rule("ffn", plain.GatedMLP, kernel_nn.GatedMLP, absorbs=True),
    Rule("loss", nn.CrossEntropyLoss, kernel_nn.CrossEntropyLoss),
    Rule(
        "ffn", nn.Sequential, kernel_nn.SequentialFFN,
        refuse=_refuse_sequential, concerns=looks_like_ffn, absorbs=True,
    ),
    Rule(
        "ffn", nn.TransformerEncoderLayer, kernel_nn.TransformerEncoderLayer,
        note=_note_encoder, absorbs=True,
    ),
    Rule(
        "linear", nn.Linear, kernel_nn.Linear,
        refuse=refuse_linear, concerns=_of_a_user,
    ),
    Rule(
        "attention", nn.MultiheadAttention, kernel_nn.MultiheadAttention,
        refuse=_refuse_attention,
    ),
    Rule(
        "attention", plain.CausalSelfAttention, kernel_nn.CausalSelfAttention,
        refuse=_refuse_attention,
    ),
]  # fmt: skip
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    RULES.append(
        Rule(
            "loss", nn.LinearCrossEntropyLoss, kernel_nn.LinearCrossEntropyLoss,
            refuse=_refuse_k_dimensions,
        )
    )  # fmt: skip


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for a module's class or the nearest of its bases; None if unknown, or swapped already."""
    for cls in class_of(module).__mro__:
        for rule in RULES:
            if cls is rule.now:
                return None
            if cls is rule.was:
                return rule if rule.concerns(module) else None
    return None


def rule_of_swapped(module: nn.Module) -> Rule | None:
    """The rule by which a module was swapped."""
    return next((rule for rule in RULES if class_of(module) is rule.now), None)
