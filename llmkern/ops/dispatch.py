"""Which implementation of an op runs, and why.

Each half of an op has a reference in PyTorch and may have a fast kernel: C++ ("cpp") for tensors on
the CPU, Triton ("triton") for tensors on a GPU.  The fast one runs unless it refuses; then the
reference runs, and says why once.  Nothing falls back silently.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _cpu
from .memory import pooled

if TYPE_CHECKING:
    from .op import Op

FAST = {"cpu": "cpp", "cuda": "triton"}
BACKENDS = ("reference", "cpp", "triton")

_forced: str | None = None
_fallback = "warn"
_told: set[str] = set()
_calls: Counter[tuple[str, str]] | None = None


class FallbackWarning(UserWarning):
    """A reference implementation ran where a fast kernel was expected."""


class FallbackError(RuntimeError):
    """The same, under `set_fallback("error")`."""


def set_fallback(mode: str) -> None:
    """What happens when a fast kernel refuses its arguments and the reference runs instead.

    Args:
        mode: "warn" (the default: once for each reason), "error" or "silent".
    """
    global _fallback
    if mode not in ("warn", "error", "silent"):
        raise ValueError(f"set_fallback: mode is {mode!r}, expected 'warn', 'error' or 'silent'")
    _fallback = mode
    _told.clear()


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op on one backend inside the `with` block.

    Args:
        backend: "reference", "cpp", "triton", or "cpp:<instruction set>" such as "cpp:avx2".
            On CPU tensors "triton" needs `TRITON_INTERPRET=1`.
    """
    global _forced
    name, _, isa = backend.partition(":")
    if name not in BACKENDS or (isa and isa not in _cpu.INSTRUCTION_SETS):
        raise ValueError(
            f"use: backend is {backend!r}, expected one of {', '.join(BACKENDS)}, "
            f"or cpp:ISA with ISA in {', '.join(_cpu.INSTRUCTION_SETS)}"
        )
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def record() -> Iterator[Counter[tuple[str, str]]]:
    """Count what runs inside the `with` block: calls of each (half of an op, backend)."""
    global _calls
    before, _calls = _calls, Counter()
    try:
        yield _calls
    finally:
        _calls = before


def fall_back(what: str, reason: str, instead: str = "on the PyTorch reference") -> None:
    """Tell the user, once, that `what` runs on its reference, and why."""
    message = f"{what} runs {instead}: {reason}"
    if _fallback == "error":
        raise FallbackError(message)
    if _fallback == "warn" and message not in _told:
        _told.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=2)


# What torch.compiler.assume_constant_result sets, without its import of the compiler: called while
# tracing, so that a compiled module warns once too instead of breaking its graph.
fall_back._dynamo_marked_constant = True


def cpu_module() -> ModuleType | str:
    """The C++ kernels that run now, or why there are none: those of `use`, else the best."""
    kind, _, isa = (_forced or "cpp").partition(":")
    return _cpu.load(isa or _cpu.best()) if kind == "cpp" else f"ops run on {kind!r}"


def runs_cpp(device: str) -> bool:
    """Whether the C++ kernels run what they do not refuse of a device's tensors."""
    return FAST.get(device) == "cpp" and not isinstance(cpu_module(), str)


runs_cpp._dynamo_marked_constant = True


@cache
def find(op: "Op", half: str, backend: str) -> Callable[..., None] | str:
    """The kernel `<op>_<half>` of a backend, or the reason why there is none."""
    name = f"{op.name}_{half}"
    kind, _, isa = backend.partition(":")
    if kind == "cpp":
        module = _cpu.load(isa or _cpu.best())
        if isinstance(module, str):
            return module
        return getattr(module, name, f"csrc/{op.family}.cpp has no {name}")
    try:
        module = import_module(f"llmkern.kernels.{op.family}")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed; `pip install triton` on Linux"
        return f"kernels/{op.family}.py cannot be imported ({error})"
    return getattr(module, name, f"kernels/{op.family}.py has no {name}")


def tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists too."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list) and a and isinstance(a[0], Tensor):
            yield from a


def _double(args: Iterable[Any]) -> bool:
    """Whether a tensor among them is float64.  A loop: it is asked in every call, and generators are slow."""
    for a in args:
        if isinstance(a, Tensor):
            if a.dtype is torch.float64:
                return True
        elif isinstance(a, list) and a and isinstance(a[0], Tensor) and _double(a):
            return True
    return False


def choose(op: "Op", half: str, args: tuple) -> tuple[str, Callable[..., None] | None, str | None]:
    """(backend, kernel, None) that will run, or ("reference", None, why not the fast one)."""
    device = next(tensors(args)).device.type
    backend = _forced or FAST.get(device)
    if backend is None:
        return "reference", None, f"there are no fast kernels for device {device!r}"
    if backend == "reference":
        return "reference", None, None
    kernel = find(op, half, backend)
    if isinstance(kernel, str):
        return "reference", None, kernel
    if _double(args):
        return "reference", None, "float64 has no fast kernel; use float32, bfloat16 or float16"
    reason = (op.refuse if half == "fwd" else op.refuse_bwd)(backend.partition(":")[0], *args)
    return ("reference", None, reason) if reason else (backend, kernel, None)


def make_kernel(op: "Op", half: str) -> Callable[..., Any]:
    """The function that torch's dispatcher calls for CPU and CUDA tensors."""
    reference = op.reference if half == "fwd" else op.reference_bwd
    outputs = op.outputs if half == "fwd" else op.outputs_bwd

    def kernel(*args):
        backend, fast, reason = choose(op, half, args)
        if _calls is not None:
            _calls[f"{op.name}_{half}", backend] += 1
        if fast is None:
            if reason is not None:
                fall_back(f"llmkern::{op.name}_{half}", reason)
            return reference(*args)
        outs = outputs(*args)  # None if the op only writes to its arguments
        made = outs if isinstance(outs, tuple) else () if outs is None else (outs,)
        if backend.startswith("cpp"):
            made = tuple(map(pooled, made))
        fast(*args, *made)
        return made if isinstance(outs, tuple) else made[0] if made else None

    return kernel


def implementations(op: "Op") -> dict[str, str]:
    """For each backend "yes", or why the op cannot run on it here."""
    table = {"reference": "yes"}
    for backend in ("cpp", "triton"):
        halves = ("fwd", "bwd") if op.gradients else ("fwd",)
        reasons = [k for half in halves if isinstance(k := find(op, half, backend), str)]
        table[backend] = reasons[0] if reasons else "yes"
    if table["triton"] == "yes" and not torch.cuda.is_available():
        table["triton"] = "yes, when a GPU is there"
    return table
