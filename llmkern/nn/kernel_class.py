"""Subclasses made for somebody's own classes, which pickle finds again.

`swap_` gives a module of class C the class kernel_class(mixin, C): a subclass of its own that has the
forward of the mixin.
"""

import sys
from functools import cache
from typing import Any

from torch import nn

ROLES = "_llmkern_roles"  # the attribute in which a swapped module keeps what was found out about it
MIXINS: dict[str, type["Kernel"]] = {}


class Kernel:
    """What is mixed in.

    Attributes:
        kind: the argument of `swap_` that turns it off.
    """

    kind: str

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):  # not the classes made below
            MIXINS[cls.__name__] = cls

    @classmethod
    def namespace(cls, own: type[nn.Module], detail: str) -> dict[str, Any]:
        """What the subclass of `own` has beside the mixin's methods."""
        return {}


def kernel_class(mixin: type[Kernel], own: type[nn.Module], detail: str = "") -> type:
    """The subclass of `own` with the mixin before it; `detail` is for the mixin's `namespace`."""
    return _make(mixin, own, detail)


@cache
def _make(mixin: type[Kernel], own: type[nn.Module], detail: str) -> type:
    name = f"{mixin.__name__}({detail}) of {own.__module__} {own.__qualname__}".replace(".", "/")
    body = {"__module__": __name__, "__doc__": mixin.__doc__, **mixin.namespace(own, detail)}
    return type(name, (mixin, own), body)


def set_class(module: nn.Module, cls: type[nn.Module], roles: dict[str, Any]) -> None:
    """Give a module a class made by `kernel_class`, and what that needs to know."""
    module.__class__ = cls
    setattr(module, ROLES, roles)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it got one of ours."""
    return type(module).__bases__[1]


def title(module: nn.Module) -> str:
    """What a report calls the class of a swapped module."""
    return type(module).__bases__[0].__name__


def __getattr__(name: str) -> type:
    label, of, path = name.partition(" of ")
    if not of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixin, _, detail = label.rstrip(")").partition("(")
    module, _, qualname = path.replace("/", ".").rpartition(" ")
    own: Any = sys.modules.get(module) or __import__(module, fromlist=["_"])
    for part in qualname.split("."):
        own = getattr(own, part)
    return kernel_class(MIXINS[mixin], own, detail)
