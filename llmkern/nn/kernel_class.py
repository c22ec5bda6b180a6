"""Subclasses made for somebody's own classes, which pickle finds again.

`swap_` gives a module of class C the class kernel_class(mixin, C): a subclass of its own that has the
forward of the mixin.
"""

import sys
from functools import cache
from types import MethodType
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


def set_kernel(module: nn.Module, mixin: type[Kernel], roles: dict[str, Any], detail: str = "") -> None:
    """Give a module the class that `kernel_class` makes, and what that needs to know."""
    set_class(module, kernel_class(mixin, class_of(module), detail))
    setattr(module, ROLES, roles)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it got one of ours."""
    return class_of(module).__bases__[1]


def title(module: nn.Module) -> str:
    """What a report calls the class of a swapped module."""
    return class_of(module).__bases__[0].__name__


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class; of one that `fully_shard` gave a class of FSDP's, the class before."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = fsdp is not None and isinstance(module, fsdp.FSDPModule)
    return type(module).__bases__[-1] if sharded else type(module)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class in place of `class_of` it."""
    own, outer = class_of(module), type(module)
    for name in ("forward", "_old_forward"):  # accelerate keeps the class's on the instance, and wraps it
        if getattr(vars(module).get(name), "__func__", None) is own.forward:
            setattr(module, name, MethodType(cls.forward, module))
    if outer is not own:
        body = {k: v for k, v in vars(outer).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"FSDP{cls.__name__}", (*outer.__bases__[:-1], cls), body)
    module.__class__ = cls


def forward_replaced(module: nn.Module) -> bool:
    """Whether somebody put another forward on the instance; accelerate's hooks run the class's."""
    held = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
    return held is not None and getattr(held, "__func__", None) is not class_of(module).forward


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
