"""Normalisation: layer_norm and rms_norm, each optionally fused with the residual add before it."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, empty, opmath, register, rows
from .sharding import SUM, Split, wanted


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation, as `torch.nn.functional.layer_norm`, with an optional residual add.

    Args:
        x: (*, *normalized_shape); float32, bfloat16, float16 or float64.
        normalized_shape: the trailing dimensions to normalise over.
        weight, bias: normalized_shape; the dtype of `x` or float32.
        eps: added to the variance.
        residual: like `x`; when given, h = x + residual is normalised.

    Returns:
        y like `x`; with `residual` the pair (y, h).

    Raises:
        ValueError: shapes that do not match.
    """
    x, residual = check("layer_norm", x, normalized_shape, residual, weight=weight, bias=bias)
    shape = x.shape
    y, h = LAYER_NORM.apply(
        _rows(x, normalized_shape), _rows(residual, normalized_shape), _flat(weight), _flat(bias), eps
    )
    return y.view(shape) if residual is None else (y.view(shape), h.view(shape))


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation, as `torch.nn.functional.rms_norm`, with an optional residual add.

    Args:
        x: (*, *normalized_shape); float32, bfloat16, float16 or float64.
        normalized_shape: the trailing dimensions to normalise over.
        weight: normalized_shape; the dtype of `x` or float32.
        eps: added to the mean square; None is the machine epsilon of `x`'s dtype, as in torch.
        residual: like `x`; when given, h = x + residual is normalised.

    Returns:
        y like `x`; with `residual` the pair (y, h).

    Raises:
        ValueError: shapes that do not match.
    """
    x, residual = check("rms_norm", x, normalized_shape, residual, weight=weight)
    shape = x.shape
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y, h = RMS_NORM.apply(_rows(x, normalized_shape), _rows(residual, normalized_shape), _flat(weight), eps)
    return y.view(shape) if residual is None else (y.view(shape), h.view(shape))


def check(name: str, x: Tensor, normalized_shape: Sequence[int], residual: Tensor | None, **params):
    """Refuse what does not fit, in one sentence; return contiguous x and residual."""
    normalized_shape = tuple(normalized_shape)
    if not x.is_floating_point():
        raise ValueError(f"{name}: x is {x.dtype}, expected a floating-point tensor")
    if not normalized_shape or tuple(x.shape[-len(normalized_shape) :]) != normalized_shape:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected its last dimensions to be "
            f"normalized_shape {normalized_shape}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{name}: residual is {residual.dtype} of shape {tuple(residual.shape)}, "
            f"expected {x.dtype} of shape {tuple(x.shape)} as x"
        )
    for key, p in params.items():
        if p is None:
            continue
        if tuple(p.shape) != normalized_shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(p.shape)}, expected normalized_shape {normalized_shape}"
            )
        if p.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: {key} is {p.dtype}, expected {x.dtype} as x, or torch.float32")
        if p.device != x.device:
            raise ValueError(f"{name}: {key} is on {p.device}, expected {x.device} as x")
    return x.contiguous(), None if residual is None else residual.contiguous()


def _rows(x: Tensor | None, normalized_shape: Sequence[int]) -> Tensor | None:
    if x is None or (x.dim() == 2 and len(normalized_shape) == 1):
        return x
    width = 1
    for size in normalized_shape:
        width *= size
    return x.view(rows(x, width), width)


def _flat(p: Tensor | None) -> Tensor | None:
    if p is None or (p.dim() == 1 and p.is_contiguous()):
        return p  # a view is a node for autograd
    return p.reshape(-1).contiguous()


class Norm(Op):
    """What the two norms share: rows of x (N, D), an optional residual, weight (D,)."""

    family = "norm"
    batched = ("x",)
    results = 2  # y and h

    @staticmethod
    def splits(half, args):
        split = dict.fromkeys(("x", "residual", "dy", "dh", "h", "mean", "rstd"), 0)
        if half == "fwd":
            stats = 2 if "bias" in args else 1
            yield Split(split, (0, wanted(args["residual"] is not None, 0), *(0,) * stats))
        else:
            yield Split(split, tuple(wanted(n, w) for n, w in zip(args["needs"], (0, SUM, SUM))))

    @staticmethod
    def samples(make: Make, weights: int) -> Iterator[Sample]:
        for sample in Norm.shapes(make, weights):
            sample.kwargs.setdefault("eps", 1e-5)  # rms_norm's default depends on the dtype
            yield sample

    @staticmethod
    def shapes(make: Make, weights: int) -> Iterator[Sample]:
        for n, d in ((7, 64), (5, 123), (1, 1), (3, 768), (2, 5001)):
            yield Sample(f"{n}x{d}", (make(n, d), (d,), *(make(d) for _ in range(weights))), {})
        yield Sample("no weight", (make(4, 3, 32), (32,)), {})
        yield Sample("two dims", (make(4, 3, 5), (3, 5), make(3, 5)), {})
        yield Sample("residual", (make(6, 40), (40,), make(40)), {"residual": make(6, 40)})
        yield Sample("empty", (make(0, 16), (16,), make(16)), {})
        yield Sample("large", (make(4, 96, scale=1e4), (96,), make(96)), {"eps": 1e-6})
        yield Sample("tiny", (make(4, 96, scale=1e-4), (96,), make(96)), {"eps": 1e-6})
        yield Sample("strided", (make(4, 6, 48)[:, ::2], (48,), make(48)), {})
        yield Sample("transposed", (make(48, 9).t(), (48,), make(48)), {})

    @staticmethod
    def benchmarks(make: Make, weights: int) -> Iterator[Sample]:
        for n, d in ((4096, 768), (4096, 4096)):
            params = tuple(make(d) for _ in range(weights))
            yield Sample(f"{n}x{d}", (make(n, d), (d,), *params), {})
            yield Sample(f"{n}x{d} + residual", (make(n, d), (d,), *params), {"residual": make(n, d)})

    @staticmethod
    def draw(make: Make, weights: int) -> Sample:
        shape = (*(make.size(12) for _ in range(make.pick(1, 2))), make.size(300))
        x = make.laid_out(*shape, scale=make.pick(1e-2, 1, 1, 100)) + make.pick(0, 0, 3)
        params = [make(shape[-1]) if make.pick(0, 1, 1) else None for _ in range(weights)]
        kwargs = {"residual": make.laid_out(*shape)} if make.pick(0, 1) else {}
        return Sample("random", (x, shape[-1:], *params), kwargs | {"eps": make.pick(1e-5, 1e-6)})

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        for width in (8192, 20000):  # the longest row that is one block, and one of several
            yield Sample(f"64x{width}", (make(64, width), (width,), make(width)), {})


@register
class LAYER_NORM(Norm):
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,  h = x + residual

    Statistics and sums are kept in float32 (float64 for float64), whatever the dtype of x.
    """

    name = "layer_norm"
    source = "Ba, Kiros, Hinton 2016, Layer Normalization, arXiv:1607.06450, eq. 4"
    gradients = {"x": 0, "residual": 0, "weight": 1, "bias": 2}
    public = staticmethod(layer_norm)

    @staticmethod
    def reference(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        f = opmath(x.dtype)
        h = x.to(f) if residual is None else (x.to(f) + residual.to(f)).to(x.dtype).to(f)  # (N, D)
        mean = h.mean(-1, keepdim=True)  # (N, 1)
        rstd = ((h - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
        y = (h - mean) * rstd
        if weight is not None:
            y = y * weight
        if bias is not None:
            y = y + bias
        return y.to(x.dtype), _kept(h, x, residual), mean.squeeze(-1), rstd.squeeze(-1)

    @staticmethod
    def outputs(x, residual, weight, bias, eps):
        stats = x.new_empty(x.shape[0], dtype=opmath(x.dtype))
        h = empty(x) if residual is None else torch.empty_like(x)
        return torch.empty_like(x), h, stats, torch.empty_like(stats)

    @staticmethod
    def save(args, outs):
        x, residual, weight, bias, eps = args
        _, h, mean, rstd = outs
        return x if residual is None else h, weight, bias, mean, rstd, eps

    @staticmethod
    def replay(h, weight, bias, mean, rstd, eps):
        return h, None, weight, bias, eps

    @staticmethod
    def reference_bwd(
        dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None,
        mean: Tensor, rstd: Tensor, eps: float, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        f = mean.dtype
        n = (h.to(f) - mean[:, None]) * rstd[:, None]  # (N, D), normalised
        g = dy.to(f) if weight is None else dy.to(f) * weight
        dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
        dx = dx if dh is None else dx + dh
        dweight = empty(h) if weight is None else (dy * n).sum(0).to(weight.dtype)
        dbias = empty(h) if bias is None else dy.to(f).sum(0).to(bias.dtype)
        return _wanted(needs, dx.to(h.dtype), dweight, dbias)

    @staticmethod
    def outputs_bwd(dy, dh, h, weight, bias, mean, rstd, eps, needs):
        return _empty_grads(needs, h, weight, bias)

    @staticmethod
    def flops(x, residual, weight, bias, eps):
        return x.numel() * (5 + sum(t is not None for t in (residual, weight, bias)))

    @staticmethod
    def flops_bwd(dy, dh, h, weight, bias, mean, rstd, eps, needs):
        return dy.numel() * (9 + 2 * needs[1] + needs[2])

    @staticmethod
    def eager(x, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None):
        h = x if residual is None else x + residual
        y = F.layer_norm(h, normalized_shape, weight, bias, eps)
        return y if residual is None else (y, h)

    @staticmethod
    def samples(make):
        yield from Norm.samples(make, weights=2)
        yield Sample("common offset", (make(4, 96) + 1000, (96,), make(96), make(96)), {})

    @staticmethod
    def benchmarks(make):
        yield from Norm.benchmarks(make, weights=2)

    @staticmethod
    def draw(make):
        return Norm.draw(make, weights=2)


@register
class RMS_NORM(Norm):
    """y = h / sqrt(mean(h²) + eps) * weight,  h = x + residual

    Sums are kept in float32 (float64 for float64), whatever the dtype of x.
    """

    name = "rms_norm"
    source = "Zhang, Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, eq. 4"
    gradients = {"x": 0, "residual": 0, "weight": 1}
    public = staticmethod(rms_norm)

    @staticmethod
    def reference(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        f = opmath(x.dtype)
        h = x.to(f) if residual is None else (x.to(f) + residual.to(f)).to(x.dtype).to(f)  # (N, D)
        rstd = (h.square().mean(-1, keepdim=True) + eps).rsqrt()  # (N, 1)
        y = h * rstd if weight is None else h * rstd * weight
        return y.to(x.dtype), _kept(h, x, residual), rstd.squeeze(-1)

    @staticmethod
    def outputs(x, residual, weight, eps):
        h = empty(x) if residual is None else torch.empty_like(x)
        return torch.empty_like(x), h, x.new_empty(x.shape[0], dtype=opmath(x.dtype))

    @staticmethod
    def save(args, outs):
        x, residual, weight, eps = args
        _, h, rstd = outs
        return x if residual is None else h, weight, rstd, eps

    @staticmethod
    def replay(h, weight, rstd, eps):
        return h, None, weight, eps

    @staticmethod
    def reference_bwd(
        dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None,
        rstd: Tensor, eps: float, needs: list[bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        f = rstd.dtype
        n = h.to(f) * rstd[:, None]  # (N, D), normalised
        g = dy.to(f) if weight is None else dy.to(f) * weight
        dx = rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
        dx = dx if dh is None else dx + dh
        dweight = empty(h) if weight is None else (dy * n).sum(0).to(weight.dtype)
        return _wanted(needs, dx.to(h.dtype), dweight)

    @staticmethod
    def outputs_bwd(dy, dh, h, weight, rstd, eps, needs):
        return _empty_grads(needs, h, weight)

    @staticmethod
    def flops(x, residual, weight, eps):
        return x.numel() * (3 + sum(t is not None for t in (residual, weight)))

    @staticmethod
    def flops_bwd(dy, dh, h, weight, rstd, eps, needs):
        return dy.numel() * (7 + 2 * needs[1])

    @staticmethod
    def eager(x, normalized_shape, weight=None, eps=None, *, residual=None):
        h = x if residual is None else x + residual
        y = F.rms_norm(h, normalized_shape, weight, eps)
        return y if residual is None else (y, h)

    @staticmethod
    def samples(make):
        yield from Norm.samples(make, weights=1)

    @staticmethod
    def benchmarks(make):
        yield from Norm.benchmarks(make, weights=1)

    @staticmethod
    def draw(make):
        return Norm.draw(make, weights=1)


def _kept(h: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    return empty(x) if residual is None else h.to(x.dtype)


def _wanted(needs: list[bool], *grads: Tensor) -> tuple[Tensor, ...]:
    return tuple(g if need else empty(g) for g, need in zip(grads, needs))


def _empty_grads(needs: list[bool], *like: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(p) if need and p is not None else empty(like[0]) for p, need in zip(like, needs)
    )
