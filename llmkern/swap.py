"""Put llmkern's kernels into somebody's model, in place, and take them out again.

A module is swapped by giving it another class, `module.__class__ = llmkern.nn.LayerNorm`: a subclass
of its own that overrides forward.  So it keeps its Parameters, names, hooks and options, and
optimizers, `state_dict`, `deepcopy` and `torch.save` see no difference.  Nothing outside the model is
touched.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from . import hf
from . import nn as kernel_nn
from .nn import found, plain
from .nn.ffn import looks_like_ffn, parts, why_unfused
from .ops.attention import MAX_HEAD_DIM
from .report import Entry, NoEffectWarning, Report, SwapError


def _nothing(module: nn.Module) -> None:
    return None


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
    refuse: Callable[[nn.Module], str | None] = _nothing
    note: Callable[[nn.Module], str | None] = _nothing
    concerns: Callable[[nn.Module], bool] = lambda module: True
    absorbs: bool = False


def _refuse_attention(module: nn.Module) -> str | None:
    if module.head_dim <= MAX_HEAD_DIM:
        return None
    return f"its head dim is {module.head_dim}, the kernels take 1 to {MAX_HEAD_DIM}"


def _refuse_linear(module: nn.Linear) -> str | None:
    device = module.weight.device.type
    return None if device == "cpu" else f"it is on {device}, where torch's own matrix product is at the limit"


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
        refuse=_refuse_linear, concerns=lambda module: type(module) is nn.Linear,
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


def swap_(
    model: nn.Module,
    attention: bool = True,
    ffn: bool = True,
    norm: bool = True,
    loss: bool | str = "auto",
    linear: bool = True,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
) -> Report:
    """Swap a model's modules for those of `llmkern.nn`, in place; `restore_` undoes it.

    Swapped are modules whose class is exactly one of torch's or of `llmkern.nn.plain`, norms and
    feed-forward layers of any class that are found by structure and proved by running them
    (`llmkern.nn.found`), and the attention of Hugging Face models; the report says why others were
    left alone.

    Args:
        model: any module; itself included.
        attention: swap MultiheadAttention, CausalSelfAttention, and set Hugging Face models to
            attention "llmkern".
        ffn: swap MLP, GatedMLP, TransformerEncoderLayer, each Sequential of linear, activation,
            linear, and modules that compute the same.
        norm: swap LayerNorm, RMSNorm, modules that compute the same, and Block (for the add inside
            the norm).
        loss: swap CrossEntropyLoss and LinearCrossEntropyLoss; "auto" does so where the model has
            one, True warns if it has none.
        linear: swap each Linear on a CPU that is no part of the above.
        filter_fn: called with (module, path); only modules for which it is true are swapped.
        strict: raise if anything that could be swapped has to be left alone.

    Returns:
        A Report, to print: every module swapped, and every candidate left alone with the reason.

    Raises:
        SwapError: with `strict`, before anything is changed.
        ValueError: an unknown `loss`.

    Warns:
        NoEffectWarning: nothing was swapped.
    """
    if loss not in (True, False, "auto"):
        raise ValueError(f"swap_: loss is {loss!r}, expected True, False or 'auto'")
    kinds = {"attention": attention, "ffn": ffn, "norm": norm, "loss": bool(loss), "linear": linear}
    report, classes, roles, absorbed = Report(), {}, {}, set()
    wanted = filter_fn or (lambda module, path: True)
    for path, module in model.named_modules():
        rule = _find(module)
        if _absorbs(module):
            absorbed.update(module.children())
        if rule is None:
            what = found.recognise(module) if _unknown(module) else None
            if what is not None and kinds[what.mixin.kind] and wanted(module, path):
                classes[module] = found.kernel_class(what.mixin, type(module))
                roles[module] = what.roles
                absorbed.update(module.children())
                report.entries.append(Entry(path, _name(module), f"llmkern.nn.{what.mixin.__name__}"))
            continue
        if not kinds[rule.kind] or not wanted(module, path):
            continue
        if rule.kind == "linear" and module in absorbed:
            continue
        reason = _why_left(module, rule)
        if reason is None:
            classes[module] = rule.now
            if rule.absorbs:
                absorbed.update(module.children())
        note = reason or rule.note(module) or ""
        report.entries.append(Entry(path, _name(module), None if reason else _name(rule.now), note))
    if strict and report.left:
        raise SwapError(f"swap_: strict=True, but these would be left alone:\n{report}")
    for module, cls in classes.items():
        module.__class__ = cls
        if module in roles:
            setattr(module, found.ROLES, roles[module])
    if attention:
        _swap_hf_attention(model, wanted, report)
    _warn_without_effect(report, model, loss)
    return report


def _swap_hf_attention(model: nn.Module, wanted: Callable, report: Report) -> None:
    """Set the outermost Hugging Face models in `model`; each sets its parts."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if not hf.is_model(module) or module in inside:
            continue
        inside.update(module.modules())
        was = hf.implementation(module)
        if was != hf.NAME and wanted(module, path):
            hf.use_kernels(module)
            report.entries.append(Entry(path, f"attention {was!r}", f"attention {hf.NAME!r}"))


def restore_(model: nn.Module) -> Report:
    """Give every module of `llmkern.nn` in `model` its torch class back, in place; reports which."""
    report = Report()
    for path, module in model.named_modules():
        if hf.is_model(module) and hasattr(module, hf.BEFORE):
            hf.restore(module)
            was = f"attention {hf.implementation(module)!r}"
            report.entries.append(Entry(path, f"attention {hf.NAME!r}", was))
        for rule in RULES:
            if type(module) is rule.now:
                module.__class__ = rule.was
                report.entries.append(Entry(path, _name(rule.now), _name(rule.was)))
        if hasattr(module, found.ROLES):
            kernel, own = type(module).__mro__[1:3]
            module.__class__ = own
            delattr(module, found.ROLES)
            report.entries.append(Entry(path, f"llmkern.nn.{kernel.__name__}", _name(own)))
    return report


@contextmanager
def swapped(model: nn.Module, **options) -> Iterator[Report]:
    """`swap_(model, **options)` inside the `with` block; afterwards the model is as it was before."""
    before = {module: type(module) for module in model.modules()}
    set_before = {module: hf.implementation(module) for module in before if hf.is_model(module)}
    known_before = {module for module in before if hasattr(module, found.ROLES)}
    try:
        yield swap_(model, **options)
    finally:
        for module, cls in before.items():
            module.__class__ = cls
            if hasattr(module, found.ROLES) and module not in known_before:
                delattr(module, found.ROLES)
        for module, was in set_before.items():
            if hf.implementation(module) != was:
                hf.restore(module)


def _find(module: nn.Module) -> Rule | None:
    """The rule for a module's class or the nearest of its bases; None if unknown, or swapped already."""
    for cls in type(module).__mro__:
        for rule in RULES:
            if cls is rule.now:
                return None
            if cls is rule.was:
                return rule if rule.concerns(module) else None
    return None


def _unknown(module: nn.Module) -> bool:
    """Whether it is a class of somebody's own, not swapped yet."""
    ours = type(module).__module__.split(".")[0] in ("torch", "llmkern")
    return not ours and not hasattr(module, found.ROLES) and "forward" not in module.__dict__


def _absorbs(module: nn.Module) -> bool:
    """Whether it is swapped already, and its kernel does the work of its linears."""
    return hasattr(module, found.ROLES) or any(type(module) is rule.now and rule.absorbs for rule in RULES)


def _why_left(module: nn.Module, rule: Rule) -> str | None:
    if type(module) is not rule.was:
        return f"a subclass of {rule.was.__name__}; only {_name(rule.was)} itself is swapped"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return rule.refuse(module)


def _name(cls: type | nn.Module) -> str:
    """torch.nn.LayerNorm, llmkern.nn.LayerNorm, mine.Model: where users import it from."""
    cls = cls if isinstance(cls, type) else type(cls)
    for prefix in ("torch.nn", "llmkern.nn.plain", "llmkern.nn"):
        if cls.__module__.startswith(prefix):
            return f"{prefix}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _warn_without_effect(report: Report, model: nn.Module, loss: bool | str) -> None:
    now = [type(module) for module in model.modules()]
    known = any(hasattr(module, found.ROLES) or hasattr(module, hf.BEFORE) for module in model.modules())
    if not known and not any(rule.now in now for rule in RULES):
        reasons = "; ".join(f"{e.path or 'the model'}: {e.note}" for e in report.left)
        reasons = reasons or "it has no module that llmkern knows"
        message = f"swap_: nothing in {type(model).__name__} was swapped: {reasons}"
        warnings.warn(message, NoEffectWarning, stacklevel=3)
    elif loss is True and not any(rule.now in now for rule in RULES if rule.kind == "loss"):
        warnings.warn(
            f"swap_: loss is True, but {type(model).__name__} has no CrossEntropyLoss module",
            NoEffectWarning,
            stacklevel=3,
        )
