"""The linear layer."""

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, autocast, empty, opmath, register
from .scratch import product
from .sharding import SUM, Split, wanted


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, as `torch.nn.functional.linear`.

    Args:
        input: (*, D); float32, bfloat16, float16 or float64.
        weight: (D_out, D), any strides, in the dtype of `input`.
        bias: (D_out,) in the dtype of `input`, or None.

    Returns:
        (*, D_out) in the dtype of `input`, or that of autocast.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    input, weight, bias = autocast(input, weight, bias)
    _check(input, weight, bias)
    rows = math.prod(input.shape[:-1])
    y = LINEAR.apply(input.reshape(rows, input.shape[-1]), weight, bias)
    return y.view(*input.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"linear: input is {x.dtype} of shape {tuple(x.shape)}, expected floating point of shape (*, D)"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)}, expected (D_out, {x.shape[-1]}) for input of "
            f"shape {tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype, t.device) != (x.dtype, x.device):
            raise ValueError(
                f"linear: {name} is {t.dtype} on {t.device}, expected {x.dtype} on {x.device} as input"
            )


@register
class LINEAR(Op):
    """y = x Wᵀ + b"""

    name = "linear"
    family = "linear"
    batched = ("input",)
    lowers = True
    source = "Goto, van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication, TOMS 34(3), sec. 4"
    gradients = {"x": 0, "weight": 1, "bias": 2}
    public = staticmethod(linear)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def outputs(x, weight, bias):
        return x.new_empty(x.shape[0], weight.shape[0])

    @staticmethod
    def save(args, outs):
        return args

    @staticmethod
    def replay(x, weight, bias):
        return x, weight, bias

    @staticmethod
    def reference_bwd(
        dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            dy @ weight if needs[0] else empty(x),
            dy.t() @ x if needs[1] else empty(x),
            dy.to(opmath(dy.dtype)).sum(0).to(dy.dtype) if needs[2] else empty(x),
        )

    @staticmethod
    def outputs_bwd(dy, x, weight, bias, needs):
        like = (x, weight, bias)
        return tuple(x.new_empty(t.shape) if need else empty(x) for t, need in zip(like, needs))

    @staticmethod
    def splits(half, args):
        if half == "fwd":
            yield Split({"x": 0}, (0,))
            yield Split({"weight": 0, "bias": 0}, (1,))  # column-parallel
            if args["bias"] is None:
                yield Split({"x": 1, "weight": 1}, (SUM,))  # row-parallel
        else:
            dx, dweight, dbias = args["needs"]
            yield Split({"dy": 0, "x": 0}, (wanted(dx, 0), wanted(dweight, SUM), wanted(dbias, SUM)))
            yield Split(
                {"dy": 1, "weight": 0, "bias": 0}, (wanted(dx, SUM), wanted(dweight, 0), wanted(dbias, 0))
            )
            yield Split({"x": 1, "weight": 1}, (wanted(dx, 1), wanted(dweight, 1), None))

    @staticmethod
    def flops(x, weight, bias):
        return 2 * x.shape[0] * weight.numel()

    @staticmethod
    def flops_bwd(dy, x, weight, bias, needs):
        return 2 * x.shape[0] * weight.numel() * (needs[0] + needs[1])

    @staticmethod
    def scratch(half, args):
        rows, (out, dim) = args["x"].shape[0], args["weight"].shape
        if half == "fwd":
            return product(rows, out, dim)
        to_x, to_weight, _ = args["needs"]
        return max(to_x * product(rows, dim, out), to_weight * product(out, dim, rows))

    @staticmethod
    def eager(input, weight, bias=None):
        return F.linear(input, weight, bias)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for n, d, out in ((9, 32, 64), (130, 96, 33), (13, 37, 29), (1, 1, 1), (5, 400, 3)):
            weight = make(out, d, scale=d**-0.5)
            yield Sample(f"{n}x{d}x{out}", (make(n, d), weight, make(out)), {})
        yield Sample("no bias", (make(2, 3, 40), make(24, 40)), {})
        yield Sample("one row", (make(40), make(24, 40), make(24)), {})
        yield Sample("transposed weight", (make(20, 24), make(24, 31).t(), make(31)), {})
        yield Sample("strided input", (make(20, 48)[:, ::2], make(31, 24), make(31)), {})
        yield Sample("empty", (make(0, 24), make(31, 24), make(31)), {})
        yield Sample("no inputs", (make(4, 0), make(31, 0), make(31)), {})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n, d, out in ((2048, 384, 1536), (2048, 768, 3072), (768, 128, 384)):
            yield Sample(f"{n}x{d}x{out}", (make(n, d), make(out, d, scale=d**-0.5), make(out)), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        n, d, out = make.size(70), make.size(150), make.size(100)
        x = make.laid_out(*make.pick((n, d), (2, n, d), (d,)), scale=make.pick(0.01, 1, 100))
        bias = make.pick(None, make(out))
        return Sample("random", (x, make.laid_out(out, d, scale=d**-0.5), bias), {})

    @staticmethod
    def condition(input, weight, bias=None) -> float:
        """Rounding errors of a sum of D terms grow with √D."""
        return math.sqrt(weight.shape[1])
