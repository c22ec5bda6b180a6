"""swap_: look at every module, decide, then change all at once."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..nn import found
from ..nn.kernel_class import ROLES, class_of, forward_replaced, set_class, set_kernel
from ..report import Change, Entry, NoEffectWarning, Report, SwapError, class_name
from . import functions, hf, hf_loss
from .example import tell_what_runs
from .refusals import why_left, why_not_tried, why_untouchable
from .restore import is_swapped
from .rules import RULES, Rule, find_rule, refuse_linear, rule_of_swapped

LOSSES = (True, False, "auto", "fused")


def swap_(
    model: nn.Module,
    attention: bool = True,
    ffn: bool = True,
    norm: bool = True,
    loss: bool | str = "auto",
    rope: bool = True,
    linear: bool = True,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    example: Any = None,
) -> Report:
    """Swap a model's modules for those of `llmkern.nn`, in place; `restore_` undoes it.

    Swapped are modules whose class is exactly one of torch's or of `llmkern.nn.plain`; norms, linears
    and feed-forward layers of any class that are found by structure and proved by running them
    (`llmkern.nn.found`); calls of `scaled_dot_product_attention`, `cross_entropy`, `layer_norm` and
    `rms_norm` in somebody's own modules (`llmkern.nn.rebound`); and attention, rotary embedding and loss
    of Hugging Face models.  The report says why others were left alone.

    Args:
        model: any module; itself included.
        attention: swap MultiheadAttention, CausalSelfAttention and calls of
            scaled_dot_product_attention, and set Hugging Face models to attention "llmkern".
        ffn: swap MLP, GatedMLP, TransformerEncoderLayer, each Sequential of linear, activation,
            linear, and modules that compute the same.
        norm: swap LayerNorm, RMSNorm, calls of their functions, modules that compute the same, and
            Block (for the add inside the norm).
        loss: swap CrossEntropyLoss, LinearCrossEntropyLoss, calls of cross_entropy, and the loss of
            Hugging Face models; "auto" does so where the model has one, True warns if it has none.
            "fused" also lets Hugging Face causal language models that train with `labels` compute
            head and loss in one op: their output then has `logits=None` while training.
        rope: swap the rotation of queries and keys in Hugging Face models.
        linear: swap each Linear on a CPU that is no part of the above.
        filter_fn: called with (module, path); only modules for which it is true are swapped.
        strict: raise if anything that could be swapped has to be left alone.
        example: a batch for the model: a tensor, a tuple of arguments or a dict of keyword arguments.
            The model runs it once, and the report tells which implementation ran.

    Returns:
        A Report, to print: every module swapped, and every candidate left alone with the reason.

    Raises:
        SwapError: with `strict`, before anything is changed.
        ValueError: an unknown `loss`.

    Warns:
        NoEffectWarning: nothing was swapped.
    """
    if loss not in LOSSES:
        raise ValueError(f"swap_: loss is {loss!r}, expected True, False, 'auto' or 'fused'")
    on = dict(attention=attention, ffn=ffn, norm=norm, loss=bool(loss), rope=rope, linear=linear)
    kinds = {kind for kind, wanted in on.items() if wanted}
    wanted = filter_fn or (lambda module, path: True)
    changes = list(_plan(model, kinds, wanted, fused=loss == "fused"))
    report = Report([change.entry for change in changes])
    if strict and report.left:
        raise SwapError(f"swap_: strict=True, but these would be left alone:\n{report}")
    for change in changes:
        change.do()
    report.watch = lambda batch: tell_what_runs(model, report, batch)
    _warn_without_effect(report, model, loss)
    return report if example is None else report.explain(example)


def _plan(model: nn.Module, kinds: set[str], wanted: Callable, fused: bool) -> Iterator[Change]:
    """What to change, in the order of `model.named_modules()`, and what to leave alone and why."""
    absorbed: set[nn.Module] = set()
    untouchable: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in untouchable:
            continue
        if reason := why_untouchable(module):
            untouchable.update(module.modules())
            yield Change(Entry(path, class_name(module), None, reason))
            continue
        if _absorbs(module):
            absorbed.update(module.children())
        if not wanted(module, path):
            continue
        rule = find_rule(module)
        if rule is None:
            yield from _plan_unknown(model, path, module, kinds, absorbed)
        elif rule.kind in kinds and not (rule.kind == "linear" and module in absorbed):
            yield _plan_known(path, module, rule, absorbed)
    models = [(path, m) for path, m in model.named_modules() if m not in untouchable and wanted(m, path)]
    if "attention" in kinds:
        yield from hf.plan(models)
    if "loss" in kinds:
        yield from hf_loss.plan(models, fused)


def _plan_known(path: str, module: nn.Module, rule: Rule, absorbed: set[nn.Module]) -> Change:
    if reason := why_left(module, rule):
        return Change(Entry(path, class_name(module), None, reason))
    if rule.absorbs:
        absorbed.update(module.children())
    entry = Entry(path, class_name(module), class_name(rule.now), rule.note(module) or "")
    return Change(entry, lambda: set_class(module, rule.now))


def _plan_unknown(
    model: nn.Module, path: str, module: nn.Module, kinds: set[str], absorbed: set[nn.Module]
) -> Iterator[Change]:
    """A class of somebody's own: what it is, or else what it calls."""
    if module in absorbed or not _unknown(module):
        return
    reason = why_not_tried(module)
    what = None if reason else found.recognise(module)
    if what is None:
        if reason and found.looks_like_one(module):
            yield Change(Entry(path, class_name(module), None, reason))
        if not forward_replaced(module):
            yield from functions.plan(path, module, kinds, model)
    elif what.mixin.kind in kinds and not (what.mixin is found.LinearKernel and refuse_linear(module)):
        if what.mixin is found.FFNKernel:
            absorbed.update(module.children())
        entry = Entry(path, class_name(module), f"llmkern.nn.{what.mixin.__name__}")
        yield Change(entry, lambda: set_kernel(module, what.mixin, what.roles))


def _unknown(module: nn.Module) -> bool:
    """Whether it is a class of somebody's own, not swapped yet."""
    ours = class_of(module).__module__.split(".")[0] in ("torch", "llmkern")
    return not ours and not hasattr(module, ROLES)


def _absorbs(module: nn.Module) -> bool:
    """Whether it is swapped already, and its kernel does the work of its linears."""
    rule = rule_of_swapped(module)
    return isinstance(module, found.FFNKernel) or (rule is not None and rule.absorbs)


def _warn_without_effect(report: Report, model: nn.Module, loss: bool | str) -> None:
    modules = list(model.modules())
    losses = [rule.now for rule in RULES if rule.kind == "loss"]
    if not any(is_swapped(module) for module in modules):
        reasons = "; ".join(f"{e.path or 'the model'}: {e.note}" for e in report.left)
        reasons = reasons or "it has no module that llmkern knows"
        message = f"swap_: nothing in {type(model).__name__} was swapped: {reasons}"
        warnings.warn(message, NoEffectWarning, stacklevel=3)
    elif loss in (True, "fused") and not any(type(m) in losses or hf_loss.is_swapped(m) for m in modules):
        warnings.warn(
            f"swap_: loss is {loss}, but {type(model).__name__} has no loss that llmkern knows",
            NoEffectWarning,
            stacklevel=3,
        )
