"""The norm of all gradients together, wherever their parts are."""

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def shards(t: Tensor) -> int:
    """Processes that hold different parts of a tensor."""
    if not isinstance(t, DTensor):
        return 1
    return prod(t.device_mesh.size(i) for i, p in enumerate(t.placements) if not p.is_replicate())


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    ranks: int,
    copy: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, for parameters on any meshes; called by all of `group`.

    Every process adds the squares of its parts, divided by the number of processes that hold the same.

    Args:
        parameters: of this process; a stage of a pipeline has its own.
        max_norm: gradients are scaled so that their norm is at most this.
        ranks: processes among which each parameter is divided or copied: those of one stage.
        copy: one of the parameters, which another stage has and counts.
        group: the processes of one model; None is all.

    Returns:
        The norm before, float64; the same on all processes.
    """
    found = [(p.grad, p is not copy) for p in parameters if p.grad is not None]
    grads = [g for g, _ in found]
    parts = [local(g).float().square().sum().double() * (shards(g) / ranks) for g, counts in found if counts]
    total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total, group=group)
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        local(g).mul_(factor.to(g.dtype))
    return norm
