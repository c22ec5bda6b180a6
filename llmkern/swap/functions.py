"""Somebody's modules that call functions which llmkern has: which, and why others not."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn.functional import KERNELS
from ..nn.kernel_class import class_of, set_kernel
from ..nn.rebound import FunctionsKernel, called, kernel
from ..nn.rotary import laid_out, rotates
from ..report import Change, Entry, class_name


def plan(path: str, module: nn.Module, kinds: set[str], model: nn.Module) -> Iterator[Change]:
    """Have a module call llmkern's functions of these kinds, if it calls any."""
    names, reasons = set(), set()
    for f in called(class_of(module)):
        if kernel(f) is not None:
            if KERNELS[f][0] in kinds:
                names.add(f.__name__)
        elif "rope" in kinds and (how := rotates(f)):
            reason = _why_not_rotated(model, how)
            (names if reason is None else reasons).add(reason or f"{f.__name__}={how}")
    for reason in reasons:
        yield Change(Entry(path, class_name(module), None, reason))
    if names:
        detail = ",".join(sorted(names))
        ours = ", ".join(sorted(name.partition("=")[0] for name in names))
        entry = Entry(path, class_name(module), "llmkern.nn.FunctionsKernel", f"calls llmkern's {ours}")
        yield Change(entry, lambda: set_kernel(module, FunctionsKernel, {}, detail))


def _why_not_rotated(model: nn.Module, how: str) -> str | None:
    """Why the tables that the model rotates by are not those of the kernel, or None."""
    makers = [m for m in model.modules() if _frequencies(m)]
    if not makers:
        return "no module makes its rotary tables; cannot prove how they are laid out"
    for maker in makers:
        made = list(_tables(maker))
        if not made or not all(laid_out(tables, how) for tables in made):
            return f"the tables of {type(maker).__name__} are not laid out as {how}"
    return None


def _frequencies(module: nn.Module) -> list[str]:
    """Names of the buffers from which it makes rotary tables."""
    return [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]


def _tables(maker: nn.Module) -> Iterator[Any]:
    """What the module returns for three positions, of each type of layer if it has several."""
    names = _frequencies(maker)
    device = getattr(maker, names[0]).device
    x, positions = torch.zeros(1, 3, 1, device=device), torch.arange(3, device=device)[None]
    several = "layer_type" in inspect.signature(maker.forward).parameters
    types = {name.removesuffix("_inv_freq").removesuffix("_original") for name in names}
    try:
        with torch.no_grad():
            for kind in types if several else (None,):
                yield maker.forward(x, positions, *(() if kind is None else (kind,)))
    except Exception:  # it is called otherwise
        return
