"""Why a module is left alone: it is compiled, quantised, without values, or not what its class says."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..nn.kernel_class import class_of, forward_replaced
from ..report import class_name
from .rules import Rule


def why_untouchable(module: nn.Module) -> str | None:
    """Why neither the module nor anything in it may be changed."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it was compiled by torch.jit; swap_ the module that it was made from"
    if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
        return "it is compiled; call swap_ before torch.compile"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled; call swap_ before module.compile()"
    if type(module).__module__.startswith("torch.ao.nn."):
        return "it is quantised by torch.ao"
    return None


def why_left(module: nn.Module, rule: Rule) -> str | None:
    """Why a module of the rule's class, or of a subclass, is left alone."""
    if class_of(module) is not rule.was:
        return f"a subclass of {rule.was.__name__}; only {class_name(rule.was)} itself is swapped"
    return _why_replaced(module) or _why_no_values(module) or rule.refuse(module)


def why_not_tried(module: nn.Module) -> str | None:
    """Why what a module of an unknown class computes cannot be found out."""
    for name, p in module.named_parameters():
        if _is_sharded(p):
            return f"its {name} is sharded, so that it cannot be tried; call swap_ before fully_shard"
    return _why_replaced(module) or _why_no_values(module)


def _why_replaced(module: nn.Module) -> str | None:
    return "its forward was replaced on the instance" if forward_replaced(module) else None


def _why_no_values(module: nn.Module) -> str | None:
    for name, p in module.named_parameters():
        if p.is_meta:
            where = "offloaded by accelerate" if "_hf_hook" in vars(module) else "on meta, without values"
            return f"its {name} is {where}; call swap_ when the weights are loaded, and not yet offloaded"
        if not p.is_floating_point():
            return f"its {name} is {p.dtype}, quantised"
        if is_traceable_wrapper_subclass(p) and not _is_sharded(p):
            return f"its {name} is a {type(p).__name__}, expected a plain tensor"
    return None


def _is_sharded(p: nn.Parameter) -> bool:
    return type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor"
