"""linear_cross_entropy whose classes several devices share: vocabulary parallelism.

Each device runs the op on its own rows of the head.  What they exchange is three numbers a token, as
Megatron-LM does it (Shoeybi et al. 2019, arXiv:1909.08053, sec. 3): a logit never leaves its device.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import linear_loss, sharding
from .op import empty

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(NamedTuple):
    """Which classes the head of this process has, and the options of the loss."""

    first: int
    classes: int  # of all parts
    group: "ProcessGroup"
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def is_split(head: Tensor) -> bool:
    """Whether several devices share the rows of head."""
    return type(head).__name__ == "DTensor" and any(p.is_shard(0) for p in head.placements)


def losses_of_parts(
    x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Losses like target, a DTensor, from DTensors; what is none counts as whole on every device.

    Tokens may be split along their first dimension, over other dimensions of the mesh than the classes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = head.device_mesh
    axis = max(i for i, p in enumerate(head.placements) if p.is_shard(0))
    x, target, bias, weight = (t if t is None else sharding.whole(t, mesh) for t in (x, target, bias, weight))
    tokens = [Shard(0) if i != axis and p.is_shard(0) else Replicate() for i, p in enumerate(x.placements)]
    rows = [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)]
    term_of_x = [Partial() if i == axis else p for i, p in enumerate(tokens)]
    term_of_head = [p if i == axis else Partial() if tokens[i].is_shard() else p for i, p in enumerate(rows)]

    def local(t: Tensor | None, placements: list, gradient: list | None = None) -> Tensor | None:
        if t is None:
            return None
        return t.redistribute(mesh, placements).to_local(grad_placements=gradient).contiguous()

    classes, size = head.shape[0], mesh.size(axis)
    if -(-classes // size) * (size - 1) >= classes:
        raise ValueError(f"linear_cross_entropy: {classes} classes on {size} devices leave one without any")
    options = ignore_index, label_smoothing, z_loss, softcap
    part = Part(sharding.part(head, rows)[0], classes, mesh.get_group(axis), *options)
    own_target = local(target, tokens)
    losses = _Losses.apply(
        local(x, tokens, term_of_x).flatten(0, -2), local(head, rows, term_of_head),
        local(bias, rows, term_of_head), own_target.flatten(), local(weight, [Replicate()] * mesh.ndim), part,
    )  # fmt: skip
    return DTensor.from_local(
        losses.view(own_target.shape),
        mesh,
        tokens,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


class _Losses(torch.autograd.Function):
    """The losses (N,), the same on all devices of a group, and each its term of dx."""

    @staticmethod
    def forward(ctx, x, head, bias, target, weight, part):
        op = linear_loss.LINEAR_CROSS_ENTROPY
        smoothing = part.label_smoothing
        terms, top, log_total, *_ = op.fwd(
            x, head, bias, target, weight, None, part.ignore_index, smoothing, 0.0, part.softcap, part.first,
            part.classes, [False] * 3,
        )  # fmt: skip
        whole_top = _reduced(top, part, "MAX")
        whole_log = _reduced((log_total + (top - whole_top)).exp(), part, "SUM").log()
        kept, _, here = linear_loss.places(target, part.ignore_index, part.first, head)
        w = top.new_ones(part.classes) if weight is None else weight.to(top.dtype)
        own_weights = w[part.first : part.first + head.shape[0]].sum()
        factor = (1 - smoothing) * w[target.where(kept, 0)] * here[
            :, 0
        ] + smoothing / part.classes * own_weights
        rise = (whole_top - top) + (whole_log - log_total)  # from the part's lse to that of all
        terms = terms + torch.where(factor == 0, 0.0, factor * rise)
        losses = _reduced(terms, part, "SUM") + part.z_loss * (whole_top + whole_log).square()
        ctx.save_for_backward(x, head, bias, target, weight, whole_top, whole_log)
        ctx.part = part
        return torch.where(kept, losses, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        part, saved = ctx.part, ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        found = linear_loss.LINEAR_CROSS_ENTROPY.bwd(
            dloss.contiguous(), *saved, None, *[empty(saved[0])] * 3, part.ignore_index, part.label_smoothing,
            part.z_loss, part.softcap, part.first, part.classes, needs,
        )  # fmt: skip
        return *(grad if need else None for grad, need in zip(found, needs)), None, None, None


def _reduced(x: Tensor, part: Part, how: str) -> Tensor:
    """The sum or maximum of all parts' x, in a tensor of its own."""
    total = x.clone()
    torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, how), part.group)
    return total
