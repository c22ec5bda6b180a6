"""Which implementation of an op would run for given inputs, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import _cpu
from .dispatch import choose, find
from .op import OPS, Op


@dataclass(frozen=True)
class Choice:
    """What would run for one half of an op.

    Attributes:
        backend: "cpp", "triton" or "reference".
        reason: why it is the reference; None for a fast kernel, or when `use("reference")` asked for it.
        variant: which of several kernels of the backend, and why not another.
    """

    backend: str
    reason: str | None
    variant: str | None = None

    def __str__(self) -> str:
        if self.backend == "triton":
            return "on the Triton kernel" + (f" {self.variant}" if self.variant else "")
        if self.backend != "reference":
            return f"on the C++ kernel ({self.backend.partition(':')[2] or _cpu.best()})"
        return "on the PyTorch reference" + (f", because {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Explanation:
    """What would run; `print` makes a sentence of it.  `backward` is None where there is none."""

    op: str
    forward: Choice
    backward: Choice | None

    def __str__(self) -> str:
        if self.backward is None:
            return f"{self.op} runs forward {self.forward}; no gradient is needed"
        if self.forward == self.backward:
            return f"{self.op} runs forward and backward {self.forward}"
        return f"{self.op} runs forward {self.forward}; backward {self.backward}"


def explain(op: str | Callable[..., Any] | Op, *inputs: Any, **kwargs: Any) -> Explanation:
    """Tell which implementation of an op would run for these inputs, and why not the fast one.

    Nothing is computed: the public function runs once on fake tensors, forward and backward.
    If no input requires a gradient, backward is told for a gradient of the first, where the op has one.

    Args:
        op: a function of `llmkern.ops` or its name, as "attention".
        inputs, kwargs: its arguments.

    Raises:
        ValueError: an unknown op; or what the op itself raises for these inputs.

    Example:
        >>> print(explain("attention", q, k, v, is_causal=True))
        attention runs forward and backward on the C++ kernel (avx512)
    """
    record, fake = _find(op), FakeTensorMode()
    inputs, kwargs = tree_map_only(Tensor, lambda t: _fake(fake, t), (inputs, kwargs))
    floats = [t for t in (*inputs, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    if record.gradients and floats and not any(t.requires_grad for t in floats):
        floats[0].requires_grad_()
    with fake, torch.enable_grad(), Listen(record) as heard:
        out = record.public(*inputs, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return Explanation(record.name, heard.choice("fwd"), heard.choice("bwd"))


def _fake(mode: FakeTensorMode, t: Tensor) -> Tensor:
    return mode.from_tensor(t.detach()).requires_grad_(t.requires_grad)


def _find(op: str | Callable[..., Any] | Op) -> Op:
    for record in OPS.values():
        if op is record or op == record.name or op is record.public:
            return record
    raise ValueError(f"explain: op is {op!r}, expected one of {', '.join(OPS)}, or the function itself")


class Listen(TorchDispatchMode):
    """Inside the `with` block, notes what each half of `op` is called with: `args["fwd"]`, `args["bwd"]`."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        self.args: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for half in ("fwd", "bwd"):
            if func is getattr(self.op, half):
                self.args[half] = args
        return func(*args, **(kwargs or {}))

    def choice(self, half: str) -> Choice | None:
        """What runs for that half; None if it was not called."""
        if half not in self.args:
            return None
        backend, _, reason = choose(self.op, half, self.args[half])
        variant = find(self.op, f"{half}_variant", backend) if backend == "triton" else ""
        return Choice(backend, reason, None if isinstance(variant, str) else variant(*self.args[half]))
