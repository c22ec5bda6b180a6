"""What a training step spends: time by kind of op, and memory."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

KINDS = {  # kind -> prefixes of the names of the ops that PyTorch's dispatcher sees
    "attention": ("aten::_scaled_dot_product", "llmkern::attention"),
    "linear and ffn": ("aten::addmm", "aten::mm", "aten::gelu", "llmkern::ffn", "llmkern::linear"),
    "norm": ("aten::native_layer_norm", "llmkern::layer_norm", "llmkern::rms_norm"),
    "loss": ("aten::_log_softmax", "aten::nll_loss", "llmkern::cross_entropy", "llmkern::linear_cross"),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach", "aten::linalg_vector_norm"),
}


def kind_of(name: str) -> str | None:
    """The kind of an op, forward or backward, of this name."""
    return next((kind for kind, prefixes in KINDS.items() if name.startswith(prefixes)), None)


class OpTimer(TorchDispatchMode):
    """Inside the `with` block, time every op.  On a GPU the time is the GPU's own."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.on_gpu = device == "cuda"
        self.spans: list[tuple[str | None, Any, Any]] = []  # kind, begin, end

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        begin = self._now()
        result = func(*args, **(kwargs or {}))
        self.spans.append((kind_of(func.name()), begin, self._now()))
        return result

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds in each kind of op so far; ops of no kind are left out."""
        if self.on_gpu:
            torch.cuda.synchronize()
        result = dict.fromkeys(KINDS, 0.0)
        for kind, begin, end in self.spans:
            if kind is not None:
                result[kind] += begin.elapsed_time(end) * 1e-3 if self.on_gpu else end - begin
        return result


def time_by_kind(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds that one call of `step` spends in each kind of op; "rest" is what remains of its time."""
    start = time.perf_counter()
    with OpTimer(device) as timer:
        step()
    seconds = timer.seconds()
    total = time.perf_counter() - start
    return {**seconds, "rest": max(0.0, total - sum(seconds.values()))}


class MemoryTracker(TorchDispatchMode):
    """Inside the `with` block, follow the bytes of all tensors that ops make, until they are freed.

    Tensors from before are not counted, nor is what an op allocates and frees within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()  # every storage seen so far

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self.known.setdefault(t.untyped_storage(), None)  # a stranger is from before
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most bytes that the tensors made by one call of `step` hold at once."""
    with MemoryTracker() as tracker:
        step()
    return tracker.peak
