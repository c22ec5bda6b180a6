"""restore_ and swapped: everything that `swap_` did, undone."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn.kernel_class import ROLES, own_class, set_class, title
from ..report import Change, Entry, Report, class_name
from . import hf, hf_loss
from .rules import rule_of_swapped


def restore_(model: nn.Module) -> Report:
    """Give every swapped module in `model` its own class and settings back, in place; reports which."""
    changes = [change for path, module in model.named_modules() for change in _undo(path, module)]
    for change in changes:
        change.do()
    return Report([change.entry for change in changes])


@contextmanager
def swapped(model: nn.Module, **options: object) -> Iterator[Report]:
    """`swap_(model, **options)` inside the `with` block; afterwards the model is as it was before."""
    from .swap import swap_

    before = {module for module in model.modules() if is_swapped(module)}
    try:
        yield swap_(model, **options)
    finally:
        for path, module in model.named_modules():
            if module not in before:
                for change in _undo(path, module):
                    change.do()


def is_swapped(module: nn.Module) -> bool:
    """Whether `swap_` changed anything of this very module."""
    return next(_undo("", module), None) is not None


def _undo(path: str, module: nn.Module) -> Iterator[Change]:
    yield from hf.undo(path, module)
    yield from hf_loss.undo(path, module)
    if rule := rule_of_swapped(module):
        entry = Entry(path, class_name(rule.now), class_name(rule.was))
        yield Change(entry, lambda: set_class(module, rule.was))
    if hasattr(module, ROLES):
        own = own_class(module)
        yield Change(
            Entry(path, f"llmkern.nn.{title(module)}", class_name(own)), lambda: _give_back(module, own)
        )


def _give_back(module: nn.Module, own: type[nn.Module]) -> None:
    set_class(module, own)
    delattr(module, ROLES)
