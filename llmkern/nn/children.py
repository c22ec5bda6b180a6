"""When may a kernel read a child's weights instead of calling the child?"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.dispatch import fall_back
from .kernel_class import forward_replaced
from .linear import Linear
from .lora import LoRA
from .quant import QuantLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, or a forward of its own."""
    return (
        any(getattr(module, name) for name in HOOKS) or "_hf_hook" in vars(module) or forward_replaced(module)
    )


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside the block calls of the module run no hooks: when we try it out, nobody is to be told."""
    kept = [(m, name, getattr(m, name)) for m in module.modules() for name in HOOKS]
    for m, name, hooks in kept:
        setattr(m, name, type(hooks)())
    try:
        yield
    finally:
        for m, name, hooks in kept:
            setattr(m, name, hooks)


def must_call(**children: nn.Module) -> str | None:
    """Why these linears cannot be fused, or None: LoRA, quantisation, sharding and hooks live in them."""
    for name, child in children.items():
        if type(child) not in (nn.Linear, Linear):
            return f"{name} is a {type(child).__name__}, not a torch.nn.Linear"
        if hooked(child):
            return f"{name} has hooks or a forward of its own"
        if is_traceable_wrapper_subclass(child.weight):
            return f"the weight of {name} is a {type(child.weight).__name__}"
    return None


def unfused(what: str, reason: str, *children: nn.Module) -> None:
    """Tell that `what` calls its children and why, unless they were quantised or given LoRA on purpose."""
    if not any(isinstance(child, (QuantLinear, LoRA)) for child in children):
        fall_back(what, reason)
