"""Exchanges of tensor parallelism behind products, which run while bytes are on their way.

A feed-forward takes its tokens in two halves: while it multiplies one, the other is gathered, or summed and
divided, forward and backward (Wang et al. 2024, Domino, arXiv:2409.15241, section 3).  Linears that take the
same x give the gradient of x first, and those of their weights while it is summed and divided (Megatron-LM;
Narayanan et al. 2021, arXiv:2104.04473, section 5.1).

Sums are those of the same products without overlap, bit for bit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ..nn import Linear
from ..ops import OPS
from ..ops.op import autocast

# torch 2.13 has new names for both
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

PIECES = 2  # of the tokens of a feed-forward

Way = Callable[[Tensor, dist.ProcessGroup], Iterator[Tensor | None]]


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor | None]:
    """Begun by the first `next`, ended by the second: (N, ...) of each to (n N, ...), by rank."""
    whole = x.new_empty(group.size() * len(x), *x.shape[1:])
    work = gather_single(whole, x.contiguous(), group=group, async_op=True)
    try:
        yield None
    finally:
        work.wait()
    yield whole


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor | None]:
    """Begun by the first `next`, ended by the second: terms (n N, ...) of a sum to this one's (N, ...)."""
    x = x.contiguous()
    part = x.new_empty(len(x) // group.size(), *x.shape[1:])
    work = scatter_single(part, x, group=group, async_op=True)
    try:
        yield None
    finally:
        work.wait()
    yield part


class Flight:
    """One exchange at a time between its beginning and its end, with this process's tensors in it.

    One that never lands, as where recomputation stops early, is waited for when it is forgotten.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()

    def start(self, way: Way, x: Tensor) -> None:
        self.going = way(x, self.group)
        next(self.going)

    def land(self) -> Tensor:
        result = next(self.going)
        del self.going
        return result


class Exchange(NamedTuple):
    """An exchange that was begun; its gradient's begins where this ends, and ends where this began."""

    ticket: Tensor  # by which autograd knows that the end belongs to the beginning
    flight: Flight
    back: Way

    @classmethod
    def begin(cls, x: Tensor, mesh: DeviceMesh, way: Way) -> "Exchange":
        """Of x; `way` is `all_gather`, whose gradient's is `reduce_scatter`, or the other way round."""
        flight = Flight(mesh)
        back = reduce_scatter if way is all_gather else all_gather
        return cls(_Begin.apply(x, flight, way), flight, back)

    def end(self) -> Tensor:
        return _End.apply(*self)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, flight: Flight, way: Way) -> Tensor:
        ctx.flight = flight
        flight.start(way, x)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.land(), None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, flight: Flight, back: Way) -> Tensor:
        ctx.flight, ctx.back = flight, back
        return flight.land()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.flight.start(ctx.back, grad)
        return grad.new_zeros(()), None, None


def in_halves(run: Callable[[Tensor], Tensor], mesh: DeviceMesh, x: Tensor) -> Tensor:
    """`run` on the tokens of all processes, which gives terms of a sum; this process's tokens of that sum.

    Args:
        run: (N, C) to (N, C), each token by itself.
        mesh: of tensor parallelism.
        x: (B, T / n, C), tokens of this process; the result is like it.
    """
    coming = [Exchange.begin(half, mesh, all_gather) for half in x.flatten(0, -2).chunk(PIECES)]
    going = [Exchange.begin(run(half.end()), mesh, reduce_scatter) for half in coming]
    return torch.cat([half.end() for half in going]).view(x.shape)


class Columns:
    """Linears divided by outputs that take the same x, gathered before them once for all.

    Args:
        linears: whose `forward` it replaces.
        mesh: of tensor parallelism.
    """

    def __init__(self, linears: list[nn.Linear], mesh: DeviceMesh) -> None:
        self.linears, self.mesh = linears, mesh
        for number, linear in enumerate(linears):
            linear.forward = partial(self._multiply, number)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T / n, C) of each process to (B, T, C), which the linears then take."""
        self.later: dict[int, Callable[[], tuple[Tensor, Tensor]]] = {}
        parameters = [p for linear in self.linears for p in (linear.weight, linear.bias)]
        return _Gather.apply(x, self.mesh, self.later, *parameters)

    def _multiply(self, number: int, x: Tensor) -> Tensor:
        linear, rows = self.linears[number], x.shape[:-1]
        x, weight, bias = autocast(x, linear.weight.detach(), _detached(linear.bias))
        kernel = isinstance(linear, Linear) and x.device.type == "cpu"  # as `llmkern.nn.linear` has it
        y = _Multiply.apply(x.flatten(0, -2), weight, bias, kernel, self.later, number)
        return y.view(*rows, len(weight))


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


class _Gather(torch.autograd.Function):
    """x of all processes, in order of time; its backward makes what `later` holds while dx is on its way."""

    @staticmethod
    def forward(ctx, x: Tensor, mesh: DeviceMesh, later: dict, *parameters: Tensor | None) -> Tensor:
        ctx.flight, ctx.later, ctx.count = Flight(mesh), later, len(parameters)
        ctx.flight.start(all_gather, x.transpose(0, 1))  # the first dimension is what is gathered
        return ctx.flight.land().transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[Any, ...]:
        ctx.flight.start(reduce_scatter, dx.transpose(0, 1))
        grads = [grad for number in sorted(ctx.later) for grad in ctx.later.pop(number)()]
        assert len(grads) == ctx.count
        return ctx.flight.land().transpose(0, 1), None, None, *grads


class _Multiply(torch.autograd.Function):
    """y = x Wᵀ + b, of which backward gives dx alone, and leaves how to make dW and db in `later`."""

    @staticmethod
    def forward(ctx, x, weight, bias, kernel: bool, later: dict, number: int) -> Tensor:
        op = OPS["linear"]
        ctx.save_for_backward(x, weight, bias)
        ctx.half, ctx.later, ctx.number = op.bwd if kernel else op.reference_bwd, later, number
        return (op.fwd if kernel else op.reference)(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        given = OPS["linear"].prepare_grad(dy), *ctx.saved_tensors
        has_bias = given[3] is not None

        def parameters() -> tuple[Tensor, Tensor | None]:
            _, dweight, dbias = ctx.half(*given, [False, True, has_bias])
            return dweight, dbias if has_bias else None

        ctx.later[ctx.number] = parameters
        return ctx.half(*given, [True, False, False])[0], None, None, None, None, None
