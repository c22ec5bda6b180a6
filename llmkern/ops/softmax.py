"""softmax and log_softmax along one dimension."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, autocast_enabled, opmath, register, rows
from .sharding import Split


def softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) divided by its sum along `dim`, as `torch.nn.functional.softmax`.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        dim: the dimension that sums to 1; any but the last costs a copy.
        dtype: that of the result, to which `x` is cast first; None is that of `x`, and float32 under
            autocast, as in torch.

    Returns:
        Like `x`; computed in float32 and rounded once.  Slices of -inf alone are NaN, as in torch.

    Raises:
        ValueError: a `dim` that `x` does not have, or a dtype that is not floating-point.
    """
    return _apply("softmax", SOFTMAX, x, dim, dtype)


def log_softmax(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """The logarithm of `softmax`, as `torch.nn.functional.log_softmax`.

    Arguments, result and errors are those of `softmax`.
    """
    return _apply("log_softmax", LOG_SOFTMAX, x, dim, dtype)


def _apply(fn: str, op: Op, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        dtype = torch.float32 if autocast_enabled(x.device.type) and x.dtype.itemsize < 4 else x.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{fn}: dtype is {dtype}, expected a floating-point one")
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise ValueError(f"{fn}: dim is {dim}, expected a dimension of x, which has {x.dim()}")
    moved = x.to(dtype).movedim(dim, -1) if x.dim() else x.to(dtype).reshape(1)
    width = moved.shape[-1]
    y = op.apply(moved.reshape(rows(moved, width), width).contiguous()).view(moved.shape)
    return y.movedim(-1, dim) if x.dim() else y.reshape(())


class RowOp(Op):
    """What both share: rows of x (N, D), and y alone is saved."""

    family = "softmax"
    batched = ("x",)
    gradients = {"x": 0}

    @staticmethod
    def outputs(x):
        return torch.empty_like(x)

    @staticmethod
    def save(args, outs):
        return (outs[0],)

    @staticmethod
    def outputs_bwd(dy, y, needs):
        return torch.empty_like(y)

    @staticmethod
    def splits(half, args):
        yield Split({"x": 0, "dy": 0, "y": 0}, (0,))

    @staticmethod
    def flops(x):
        return x.numel() * 4

    @staticmethod
    def flops_bwd(dy, y, needs):
        return y.numel() * 4

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for shape in ((7, 65), (3, 1000), (1, 1), (2, 5001), (2, 3, 4, 16), (9,)):
            yield Sample("x".join(map(str, shape)), (make(*shape),), {})
        yield Sample("first dim", (make(5, 4, 3), 0), {})
        yield Sample("inner dim", (make(5, 4, 3), 1), {})
        yield Sample("scalar", (make(),), {})
        yield Sample("no columns", (make(3, 0),), {})
        yield Sample("empty", (make(0, 16),), {})
        yield Sample("large", (make(4, 40, scale=1e4),), {})
        yield Sample("common offset", (make(4, 40) + 1000,), {})
        yield Sample("transposed", (make(20, 6).t(),), {})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n, d in ((8192, 1024), (1024, 50257)):
            yield Sample(f"{n}x{d}", (make(n, d),), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        shape = [make.size(20) for _ in range(make.pick(0, 1, 2))]
        x = make.laid_out(*shape, make.size(300), scale=make.pick(0.01, 1, 30))
        return Sample("random", (x, make.pick(-1, -1, *range(x.dim()))), {})


@register
class SOFTMAX(RowOp):
    """y = exp(x - max x) / Σ exp(x - max x)

    Backward is dx = y (dy - Σ dy y).
    """

    name = "softmax"
    source = "Milakov, Gimelshein 2018, Online normalizer calculation for softmax, arXiv:1805.02867, alg. 3"
    public = staticmethod(softmax)

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        e = _away(x).exp()
        return (e / e.sum(-1, keepdim=True)).to(x.dtype)

    @staticmethod
    def reference_bwd(dy: Tensor, y: Tensor, needs: list[bool]) -> Tensor:
        f = opmath(y.dtype)
        g = dy.to(f)
        return (y.to(f) * (g - (g * y.to(f)).sum(-1, keepdim=True))).to(y.dtype)

    @staticmethod
    def eager(x, dim=-1, dtype=None):
        return F.softmax(x, dim, dtype=dtype)


@register
class LOG_SOFTMAX(RowOp):
    """y = x - max x - log Σ exp(x - max x)

    Backward is dx = dy - exp(y) Σ dy.
    """

    name = "log_softmax"
    source = SOFTMAX.source
    public = staticmethod(log_softmax)

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        away = _away(x)
        return (away - away.exp().sum(-1, keepdim=True).log()).to(x.dtype)

    @staticmethod
    def reference_bwd(dy: Tensor, y: Tensor, needs: list[bool]) -> Tensor:
        f = opmath(y.dtype)
        g = dy.to(f)
        return (g - y.to(f).exp() * g.sum(-1, keepdim=True)).to(y.dtype)

    @staticmethod
    def eager(x, dim=-1, dtype=None):
        return F.log_softmax(x, dim, dtype=dtype)


def _away(x: Tensor) -> Tensor:
    """x minus the maximum of its row; rows of no columns stay."""
    x = x.to(opmath(x.dtype))
    return x - x.amax(-1, keepdim=True) if x.shape[1] else x
