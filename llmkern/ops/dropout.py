"""Dropout without a stored mask, with an optional residual add."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox, sharding
from .op import Make, Op, Sample, opmath, register, rows


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    seed: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Zero each element with probability p and divide the others by 1 - p, as torch's `dropout`.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        p: in [0, 1].
        training: if False, nothing is dropped.
        seed: int64, one element; None draws one from torch's generator.  What is dropped is a function
            of the seed and of the place in `x`, (row, column) with the last dimension as columns: the
            same on every device and for any number of threads, and made again in backward.
        residual: like `x`; is added to the result in the same pass.

    Returns:
        Like `x`; computed in float32 and rounded once.

    Raises:
        ValueError: p outside [0, 1], a residual or seed that does not fit.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p is {p}, expected a number in [0, 1]")
    if not x.is_floating_point():
        raise ValueError(f"dropout: x is {x.dtype}, expected a floating-point tensor")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (
        x.shape, x.dtype, x.device
    ):  # fmt: skip
        raise ValueError(
            f"dropout: residual is {residual.dtype} of shape {tuple(residual.shape)} on {residual.device}, "
            f"expected {x.dtype} of shape {tuple(x.shape)} on {x.device} as x"
        )
    if not training or p == 0:
        return x if residual is None else x + residual
    seed = philox.new_seed(x, seed)
    if sharding.is_sharded(x):
        return _on_parts(x, float(p), seed, residual)
    return DROPOUT.apply(_matrix(x), _matrix(residual), seed, float(p), 0).view(x.shape)


def _on_parts(x: Tensor, p: float, seed: Tensor, residual: Tensor | None) -> Tensor:
    """Of a DTensor: each process drops in its own rows what one process would drop there."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    rows_apart = x.dim() > 1
    split = [Shard(0) if rows_apart and at.is_shard(0) else Replicate() for at in x.placements]
    local, added = (
        None if t is None
        else sharding.like(t, x).redistribute(x.device_mesh, split).to_local(grad_placements=split)
        for t in (x, residual)
    )  # fmt: skip
    first = sharding.part(x, split)[0] * math.prod(x.shape[1:-1])
    y = DROPOUT.apply(_matrix(local), _matrix(added), seed, p, first).view(local.shape)
    return DTensor.from_local(y, x.device_mesh, split, run_check=False, shape=x.shape, stride=x.stride())


def _matrix(x: Tensor | None) -> Tensor | None:
    """x as (rows, columns), contiguous."""
    if x is None:
        return None
    width = x.shape[-1] if x.dim() else 1
    return x.reshape(rows(x, width), width).contiguous()


def _factors(x: Tensor, seed: Tensor, p: float, first: int = 0) -> Tensor:
    """What the elements of x (N, D), which begins at row `first`, are multiplied by."""
    places, cols = (torch.arange(size, device=x.device) for size in x.shape)
    return philox.factors(seed, first + places[:, None], cols, p, opmath(x.dtype))


@register
class DROPOUT(Op):
    """y = residual + x m,  m = 0 with probability p, else 1 / (1 - p)

    m is a function of the seed and the place (Philox), so backward, dx = dy m, reads no mask.
    """

    name = "dropout"
    family = "dropout"
    source = (
        "Srivastava et al. 2014, Dropout, JMLR 15, sec. 4 and 10; "
        "Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, sec. 4.3"
    )
    gradients = {"x": 0}
    passes = {"residual": 0}
    public = staticmethod(dropout)

    @staticmethod
    def reference(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, first: int) -> Tensor:
        y = x.to(opmath(x.dtype)) * _factors(x, seed, p, first)
        return (y if residual is None else y + residual).to(x.dtype)

    @staticmethod
    def outputs(x, residual, seed, p, first):
        return x.new_empty(x.shape)

    @staticmethod
    def save(args, outs):
        return args[2:]

    @staticmethod
    def reference_bwd(dy: Tensor, seed: Tensor, p: float, first: int, needs: list[bool]) -> Tensor:
        return (dy.to(opmath(dy.dtype)) * _factors(dy, seed, p, first)).to(dy.dtype)

    @staticmethod
    def outputs_bwd(dy, seed, p, first, needs):
        return dy.new_empty(dy.shape if needs[0] else 0)

    @staticmethod
    def flops(x, residual, seed, p, first):
        return x.numel() * (1 if residual is None else 2)

    @staticmethod
    def flops_bwd(dy, seed, p, first, needs):
        return dy.numel()

    @staticmethod
    def eager(x, p=0.5, training=True, seed=None, *, residual=None):
        """With a seed the same elements are dropped; without, torch's own `dropout` chooses."""
        if seed is None or not training:
            y = F.dropout(x, p, training)
        else:
            y = (x * _factors(_matrix(x), seed, p).view(x.shape)).to(x.dtype)
        return y if residual is None else y + residual

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for shape, p in (((7, 65), 0.5), ((3, 200), 0.1), ((2, 3, 16), 0.9), ((1, 1), 0.3), ((5,), 0.5)):
            label = f"{'x'.join(map(str, shape))}, {p}"
            yield Sample(label, (make(*shape), p), {"seed": make.integers(2**62)})
        kwargs = {"seed": make.integers(2**62), "residual": make(4, 70)}
        yield Sample("residual", (make(4, 70), 0.25), kwargs)
        yield Sample("scalar", (make(), 0.5), {"seed": make.integers(2**62, 1)})
        yield Sample("all dropped", (make(4, 20), 1.0), {"seed": make.integers(9)})
        yield Sample("empty", (make(0, 16), 0.5), {"seed": make.integers(9)})
        yield Sample("no columns", (make(3, 0), 0.5), {"seed": make.integers(9)})
        yield Sample("transposed", (make(20, 6).t(), 0.5), {"seed": make.integers(9)})
        yield Sample("not training", (make(3, 5), 0.5, False), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        shape = [make.size(20) for _ in range(make.pick(1, 2, 3))]
        kwargs = {"seed": make.integers(2**62), "residual": make.pick(None, make(*shape))}
        return Sample("random", (make.laid_out(*shape), make.choices.random()), kwargs)

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        yield Sample("8192x768", (make(8192, 768), 0.1), {})
        yield Sample("8192x768 + residual", (make(8192, 768), 0.1), {"residual": make(8192, 768)})
