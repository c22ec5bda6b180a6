"""What a process exchanges with others, counted where it is handed to the process group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# op of c10d, or of its functional form -> what it is
KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}
# times (n - 1) / n of the payload, what one has before a reduce or after a gather, go over the slowest link
# (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md)
FACTORS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


class Traffic(TorchDispatchMode):
    """Inside the `with` block, add up the exchanges of this process, forward and backward.

    Attributes:
        calls: kind -> how many.
        sent: kind -> bytes that each process sends, by the ring or tree that the planner counts too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = KINDS.get(func.overloadpacket.__name__)
            if kind:
                self._add(kind, args, result)
        return result

    def _add(self, kind: str, args: tuple, result: Any) -> None:
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
        size = max(t.numel() * t.element_size() for t in tensors)
        n = _processes(args)
        part = FACTORS[kind] * (n - 1) / n if kind in FACTORS else 1.0
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sent[kind] = self.sent.get(kind, 0.0) + part * size


def _processes(args: tuple) -> int:
    """How many take part, from the group among the arguments, or its name."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            return dist.ProcessGroup.unbox(value).size()
    name = next(value for value in reversed(args) if isinstance(value, str))
    return dist.distributed_c10d._resolve_process_group(name).size()
