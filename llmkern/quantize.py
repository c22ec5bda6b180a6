"""Quantise the linears of somebody's model in place, weights only.

A linear becomes a `llmkern.nn.QuantLinear`, another module with other state_dict keys: unlike `swap_`
there is no way back, the weights are rounded.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from . import nn as kernel_nn
from .nn import QuantLinear
from .nn.children import hooked
from .ops.quant_weight import quantize, why_not
from .report import Entry, Report


@dataclass(frozen=True)
class Int8WeightOnly:
    """8 bits an element; half of bfloat16's memory.

    Attributes:
        group_size: elements of a row that share a scale, a multiple of 32; None is the whole row.
        symmetric: without mins.
    """

    group_size: int | None = None
    symmetric: bool = True
    bits = 8


@dataclass(frozen=True)
class Int4WeightOnly:
    """4 bits an element, and 16 for the scale of each group.

    Attributes:
        group_size: elements of a row that share a scale, a multiple of 32; None is the whole row.
        symmetric: without mins, 16 bits more for each group.
    """

    group_size: int | None = 128
    symmetric: bool = True
    bits = 4


def quantize_(
    model: nn.Module,
    config: Int8WeightOnly | Int4WeightOnly,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:
    """Replace a model's linears by `llmkern.nn.QuantLinear`, in place.

    Replaced are modules whose class is exactly torch.nn.Linear, llmkern.nn.Linear or Hugging Face's Conv1D.
    A linear that shares its weight with another module, as GPT-2's head does with its embedding, gets a
    quantised copy; the other module keeps the weight.

    Args:
        model: any module with linears inside.
        config: `Int8WeightOnly()` or `Int4WeightOnly(group_size=128)`.
        filter_fn: called with (module, path); only linears for which it is true are replaced.

    Returns:
        A Report, to print: every linear replaced, and every one left alone with the reason.

    Raises:
        TypeError: another config.
        ValueError: `model` is itself a linear, which cannot be replaced in place.
    """
    if not isinstance(config, (Int8WeightOnly, Int4WeightOnly)):
        raise TypeError(
            f"quantize_: config is {type(config).__name__}, expected Int8WeightOnly or Int4WeightOnly"
        )
    if _weight(model) is not None:
        raise ValueError(
            f"quantize_: model is a {type(model).__name__}, expected a module with linears inside; "
            "QuantLinear.from_linear makes one of a linear"
        )
    report, owners, made = Report(), _owners(model), {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for name, child in list(module._modules.items()):  # named_children tells of each once
            full = f"{path}.{name}" if path else name
            if not isinstance(child, nn.Linear) and _weight(child) is None:
                continue
            if filter_fn is not None and not filter_fn(child, full):
                continue
            reason = _why_left(child, module, config)
            if reason is None:
                if child not in made:  # one module in two places stays one
                    made[child] = _quantized(child, config)
                setattr(module, name, made[child])
            others = [p for p, owner in owners[id(child.weight)] if owner is not child]
            note = f"a copy: {', '.join(others)} keeps the weight" if others and reason is None else ""
            now = None if reason else "llmkern.nn.QuantLinear"
            report.entries.append(Entry(full, _name(child), now, reason or note))
    return report


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that hold each parameter, and their paths."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((path, module))
    return owners


def _weight(module: nn.Module) -> Tensor | None:
    """The (out, in) weight of a linear that can be replaced."""
    if type(module) in (nn.Linear, kernel_nn.Linear):
        return module.weight
    utils = sys.modules.get("transformers.pytorch_utils")  # its Conv1D is a linear with weight (in, out)
    if utils is not None and type(module) is utils.Conv1D:
        return module.weight.t()
    return None


def _why_left(module: nn.Module, parent: nn.Module, config: Int8WeightOnly | Int4WeightOnly) -> str | None:
    weight = _weight(module)
    if weight is None:
        return "a subclass of Linear; only torch.nn.Linear itself is replaced"
    if (
        isinstance(parent, nn.TransformerEncoderLayer)
        and type(parent) is not kernel_nn.TransformerEncoderLayer
    ):
        return "torch's TransformerEncoderLayer reads its weight; swap_ the layer first"
    if hooked(module):
        return "it has hooks or a forward of its own"
    if weight.is_meta:
        return "its weight is on meta: there is nothing to quantise yet"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return why_not(weight.shape[1], config.bits, config.group_size)


def _quantized(module: nn.Module, config: Int8WeightOnly | Int4WeightOnly) -> QuantLinear:
    weight = quantize(_weight(module), config.bits, config.group_size, config.symmetric)
    return QuantLinear(weight, module.bias).train(module.training)


def _name(module: nn.Module) -> str:
    room = "llmkern.nn" if isinstance(module, kernel_nn.Linear) else type(module).__module__
    return f"{room.replace('torch.nn.modules.linear', 'torch.nn')}.{type(module).__name__}"
