"""One step of a model, op by op: what each call does, for which module, how long, and in which memory."""

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ops.dispatch import runs_cpp
from . import costs
from .memory import Ledger

LARGE = 32 * 2**20  # bytes; glibc returns larger blocks to the system when they are freed (mallopt(3))
PHASES = ("data", "forward", "backward", "recompute", "optimizer")


@dataclass
class Call:
    """One call of an op.

    Attributes:
        op: "aten.addmm", "llmkern.ffn_fwd".
        path: of the module that it works for, as in `named_modules()`; in backward that of its forward.
        phase: one of PHASES.
        dtype: the narrowest floating-point dtype of its tensors, in which it computes.
        flops, bytes, model_flops: see `costs.Work`.
        fresh: bytes of its outputs that the C library takes from the system anew at every call.
        seconds: measured; 0 in a trace of fake tensors.
        collective: whether it moves data between devices; it is then waited for, so nothing hides it.
    """

    op: str
    path: str
    phase: str
    dtype: torch.dtype
    flops: float
    bytes: float
    model_flops: float
    fresh: float = 0.0
    seconds: float = 0.0
    collective: bool = False


class Tracer(TorchDispatchMode):
    """Inside the `with` block, record every op that is more than a view.

    Args:
        model: whose modules get names.
        device: "cuda" is timed by the GPU's own events.
        timed: False for fake tensors.
    """

    def __init__(self, model: nn.Module, device: str, timed: bool = True) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.device, self.timed = device, timed
        self.calls: list[Call] = []
        self.spans: list[tuple[Any, Any]] = []
        self.ledger = Ledger()
        self.scratch = 0  # bytes of the op that takes the most for itself, on a CPU
        self.phase = "forward"
        self.stack: list[str] = []
        self.marks: list[tuple[int, str]] = [(0, "")]  # from this autograd node on, the module is this

    def __enter__(self) -> "Tracer":
        self.hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self.hooks:
            hook.remove()
        self._read_clock()

    def _enter(self, module: nn.Module, args: Any) -> None:
        above = self.stack[-1] if self.stack else ""
        default = f"{above}.{type(module).__name__}" if above else type(module).__name__
        self.stack.append(self.names.get(module, default))
        self._mark()

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.stack.pop()
        self._mark()

    def _mark(self) -> None:
        self.marks.append((torch.autograd._get_sequence_nr(), self.stack[-1] if self.stack else ""))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.ledger.add((args, kwargs), "inputs")  # a stranger is from before
        begin = self._now()
        out = func(*args, **kwargs)
        collective = costs.is_collective(func)
        if collective:
            _wait(out)
        end = self._now()
        if self.ledger.has_all(out) and not costs.written_arguments(func) and not collective:
            return out
        part = "activations" if self.phase in ("forward", "recompute") else "temporary"
        made = self.ledger.add(out, part)
        self._record(func, args, kwargs, out, sum(size for size in made if size > LARGE))
        self.spans.append((begin, end))
        self.ledger.now += 1
        return out

    def _record(self, func: Any, args: tuple, kwargs: dict, out: Any, large: int) -> None:
        phase, path = self.phase, self.stack[-1] if self.stack else ""
        if phase == "backward":
            if self.stack:  # a forward inside backward: checkpointing
                phase = "recompute"
            else:
                path = self._path_of_backward()
        flops, moved, model_flops = costs.work(func, args, kwargs, out)
        if phase == "recompute":
            model_flops = 0.0
        name = func._schema.name.replace("::", ".")
        if runs_cpp(self.device):
            self.scratch = max(self.scratch, costs.scratch(func, args, kwargs))
        kept = self.device != "cpu" or name.startswith("llmkern.")  # both have allocators that keep memory
        dtype = _dtype((args, kwargs, out))
        fresh = 0.0 if kept else float(large)
        call = Call(name, path, phase, dtype, flops, moved, model_flops, fresh)
        call.collective = costs.is_collective(func)
        self.calls.append(call)

    def _path_of_backward(self) -> str:
        """The module in whose forward the autograd node that runs was made."""
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        place = bisect_right(self.marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        return self.marks[place][1]

    def _now(self) -> Any:
        if not self.timed:
            return 0.0
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_clock(self) -> None:
        if self.timed and self.device == "cuda":
            torch.cuda.synchronize()
        for call, (begin, end) in zip(self.calls, self.spans):
            gpu = self.timed and self.device == "cuda"
            call.seconds = begin.elapsed_time(end) * 1e-3 if gpu else end - begin

    @contextmanager
    def gradients_of(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, what arrives at a parameter is counted as its gradient."""
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: self.ledger.move(p.grad, "gradients"))
            for p in model.parameters()
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _wait(out: Any) -> None:
    """Until a collective is done, which otherwise goes on behind what is called next."""
    works = [value for value in tree_leaves(out) if isinstance(value, torch.ScriptObject)]
    for work in works:
        torch.distributed.Work.unbox(work).wait()


def _dtype(values: Any) -> torch.dtype:
    """The narrowest floating-point dtype among the tensors, 16 bits at least."""
    found = {t.dtype for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()}
    return min(found, key=lambda d: (d.itemsize, str(d)), default=torch.float32)
