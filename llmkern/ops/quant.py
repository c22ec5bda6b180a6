"""The linear layer with a weight in 8 or 4 bits."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, autocast, empty, opmath, register
from .quant_weight import BLOCK, QuantWeight, depth, dequantize, quantize
from .sharding import SUM, Split, wanted


def quant_linear(
    input: Tensor,
    qweight: Tensor,
    scales: Tensor,
    mins: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b for a weight in 8 or 4 bits, as `quantize` makes it; products and sums in float32.

    Args:
        input: (*, D); float32, bfloat16, float16 or float64.
        qweight: (D_out, D) int8, or (D_out, D / 2) uint8 with two codes of 4 bits a byte: of each 32
            neighbours the first 16 in the low halves of 16 bytes, the last 16 in the high halves.
        scales: (D_out, G) floating point, each for D / G neighbours along D: all of D, or a multiple of 32.
        mins: like scales; w is s q + m.  Without, w is s q, and with 4 bits s (q - 8).
        bias: (D_out,) in the dtype of `input`, or None.

    Returns:
        (*, D_out) in the dtype of `input`, or that of autocast.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    input, bias = autocast(input, bias)
    _check(input, qweight, scales, mins, bias)
    rows = math.prod(input.shape[:-1])
    y = QUANT_LINEAR.apply(
        input.reshape(rows, input.shape[-1]), qweight.contiguous(), scales.contiguous(),
        None if mins is None else mins.contiguous(), bias,
    )  # fmt: skip
    return y.view(*input.shape[:-1], qweight.shape[0])


def _check(x: Tensor, qweight: Tensor, scales: Tensor, mins: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"quant_linear: input is {x.dtype} of shape {tuple(x.shape)}, expected floating point of shape "
            "(*, D)"
        )
    if qweight.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"quant_linear: qweight is {qweight.dtype}, expected torch.int8 or torch.uint8")
    width = x.shape[-1]
    multiple = 1 if qweight.dtype == torch.int8 else BLOCK
    if width < 1 or width % multiple:
        raise ValueError(
            f"quant_linear: input has {width} columns, expected a multiple of {multiple} for a qweight of "
            f"{qweight.dtype}"
        )
    if qweight.dim() != 2 or depth(qweight) != width:
        columns = "D" if multiple == 1 else "D / 2"
        raise ValueError(
            f"quant_linear: qweight is {qweight.dtype} of shape {tuple(qweight.shape)}, expected "
            f"(D_out, {columns}) with D = {width} as input"
        )
    out = qweight.shape[0]
    if scales.dim() != 2 or scales.shape[0] != out or not _divides(scales.shape[1], width):
        raise ValueError(
            f"quant_linear: scales has shape {tuple(scales.shape)}, expected ({out}, G) with G 1, or "
            f"{width} / G a multiple of {BLOCK}"
        )
    if mins is not None and (mins.shape, mins.dtype) != (scales.shape, scales.dtype):
        raise ValueError(
            f"quant_linear: mins is {mins.dtype} of shape {tuple(mins.shape)}, expected {scales.dtype} of "
            f"shape {tuple(scales.shape)} as scales"
        )
    if not scales.is_floating_point():
        raise ValueError(f"quant_linear: scales is {scales.dtype}, expected floating point")
    if bias is not None and (bias.dtype, tuple(bias.shape)) != (x.dtype, (out,)):
        raise ValueError(
            f"quant_linear: bias is {bias.dtype} of shape {tuple(bias.shape)}, expected {x.dtype} of shape "
            f"({out},)"
        )
    for name, t in (("qweight", qweight), ("scales", scales), ("mins", mins), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"quant_linear: {name} is on {t.device}, expected {x.device} as input")


def _divides(groups: int, width: int) -> bool:
    return groups == 1 or (groups > 1 and width % groups == 0 and width // groups % BLOCK == 0)


@register
class QUANT_LINEAR(Op):
    """y = x Wᵀ + b,  w = s q + m with s and m of its group, s q or s (q - 8) without m

    The weight is dequantised where it is used, never whole in memory.  It has no gradient: a frozen base
    under adapters gives those of x and b.
    """

    name = "quant_linear"
    family = "quant"
    batched = ("input",)
    varies = (
        "the number of rows chooses the formula: one row meets codes as whole numbers, a few meet decoded "
        "weights in registers, many meet them rounded to the dtype of input"
    )
    lowers = True
    source = (
        "Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, sec. 2.1; "
        "Frantar et al. 2022, GPTQ, arXiv:2210.17323, sec. 4 (groups); GGUF's Q8_0, Q4_0 and Q4_1"
    )
    gradients = {"x": 0, "bias": 1}
    constant = ("scales", "mins")
    public = staticmethod(quant_linear)

    @staticmethod
    def reference(
        x: Tensor, qweight: Tensor, scales: Tensor, mins: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        f = opmath(x.dtype)
        weight = dequantize(qweight, scales, mins, f)
        return F.linear(x.to(f), weight, None if bias is None else bias.to(f)).to(x.dtype)

    @staticmethod
    def outputs(x, qweight, scales, mins, bias):
        return x.new_empty(x.shape[0], qweight.shape[0])

    @staticmethod
    def save(args, outs):
        return args[1:4]

    @staticmethod
    def reference_bwd(
        dy: Tensor, qweight: Tensor, scales: Tensor, mins: Tensor | None, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        f = opmath(dy.dtype)
        return (
            (dy.to(f) @ dequantize(qweight, scales, mins, f)).to(dy.dtype) if needs[0] else empty(dy),
            dy.to(f).sum(0).to(dy.dtype) if needs[1] else empty(dy),
        )

    @staticmethod
    def outputs_bwd(dy, qweight, scales, mins, needs):
        return (
            dy.new_empty(dy.shape[0], depth(qweight)) if needs[0] else empty(dy),
            dy.new_empty(dy.shape[1]) if needs[1] else empty(dy),
        )

    @staticmethod
    def splits(half, args):
        """By rows of x, by outputs, or by inputs where every device has whole groups."""
        qweight, scales, mesh = args["qweight"].tensor_meta, args["scales"], args["qweight"].mesh
        tables = ("scales", "mins")
        outs = {"qweight": 0, **dict.fromkeys(tables, 0)}
        groups = scales.shape[1]
        devices = [mesh.size(i) for i in range(mesh.ndim)]
        unit = depth(qweight) // groups if groups > 1 else 1 if qweight.dtype == torch.int8 else BLOCK
        even = all(depth(qweight) % (n * unit) == 0 for n in devices)
        inner = {"qweight": 1, **(dict.fromkeys(tables, 1) if groups > 1 else {})}
        if half == "fwd":
            yield Split({"x": 0}, (0,))
            yield Split({**outs, "bias": 0}, (1,))
            if even and args["bias"] is None:
                yield Split({"x": 1, **inner}, (SUM,))
        else:
            dx, dbias = args["needs"]
            yield Split({"dy": 0}, (wanted(dx, 0), wanted(dbias, SUM)))
            yield Split({"dy": 1, **outs}, (wanted(dx, SUM), wanted(dbias, 0)))
            if even:
                yield Split(inner, (wanted(dx, 1), None))

    @staticmethod
    def flops(x, qweight, scales, mins, bias):
        return 2 * x.numel() * qweight.shape[0]

    @staticmethod
    def flops_bwd(dy, qweight, scales, mins, needs):
        return 2 * dy.numel() * depth(qweight) * needs[0]

    @staticmethod
    def eager(input, qweight, scales, mins=None, bias=None):
        """torch keeps a weight dense: benchmarks put it beside qweight, so that it is not made each time."""
        weight = getattr(qweight, "dense", None)
        if weight is None:
            weight = dequantize(qweight, scales, mins, opmath(input.dtype)).to(input.dtype)
        return F.linear(input, weight, bias)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        def weight(out: int, d: int, *args, **kwargs) -> QuantWeight:
            return quantize(make(out, d, scale=d**-0.5), *args, **kwargs)

        yield Sample("small", (make(3, 5), *weight(4, 5), make(4)), {})
        for n in (1, 2, 7, 61):
            for d, out in ((96, 33), (37, 29)):
                yield Sample(f"int8 {n}x{d}x{out}", (make(n, d), *weight(out, d), make(out)), {})
        for n in (1, 5, 61):
            groups = weight(37, 192, 8, 32), weight(37, 192, 4, 64), weight(37, 192, 4, 96, False)
            for label, quantized in zip(("int8", "int4", "int4 mins"), groups):
                yield Sample(f"{label} groups {n}x192", (make(n, 192), *quantized, make(37)), {})
        yield Sample("int8 mins", (make(3, 45), *weight(20, 45, symmetric=False), make(20)), {})
        yield Sample("int8 mins of groups", (make(13, 64), *weight(20, 64, 8, 32, False)), {})
        for n in (3, 70):
            yield Sample(f"int4 rows {n}", (make(n, 96), *weight(19, 96, 4)), {})
        yield Sample(
            "int4 float32 scales", (make(2, 64), *weight(9, 64, 4, 32, scale_dtype=torch.float32)), {}
        )
        bf16 = weight(9, 64, 4, 32, False, torch.bfloat16)
        yield Sample("int4 bfloat16 scales", (make(2, 3, 64), *bf16), {})
        yield Sample("no bias", (make(2, 3, 40), *weight(24, 40)), {})
        yield Sample("one row", (make(64), *weight(24, 64, 4, 32), make(24)), {})
        for args in ((4, 32), (4, 32, False), (4,), (4, None, False)):
            yield Sample(f"one row {args}", (make(1, 416), *weight(37, 416, *args), make(37)), {})
        yield Sample("one row of long groups", (make(1, 384), *weight(18, 384, 4, 128, False)), {})
        yield Sample("strided input", (make(20, 128)[:, ::2], *weight(31, 64, 4, 64), make(31)), {})
        yield Sample("strided rows", (make(4, 80)[::2, 7:47], *weight(31, 40), make(31)), {})
        yield Sample("empty", (make(0, 24), *weight(31, 24), make(31)), {})
        yield Sample("one output", (make(5, 400), *weight(1, 400), make(1)), {})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n, d, out in ((1, 768, 50304), (1, 768, 3072), (1, 8192, 2048), (4, 768, 3072), (512, 768, 3072)):
            for label, args in (("int8", (8,)), ("int8 g32", (8, 32)), ("int4 g32", (4, 32))):
                q = quantize(make(out, d, scale=d**-0.5), *args)
                q.qweight.dense = dequantize(*q, torch.float32).to(make.dtype)
                yield Sample(f"{label} {n}x{d}x{out}", (make(n, d), *q), {})

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        for n in (1, 512):
            for args in ((8, 128), (4, 128), (4, 64, False), (8, None, False), (4, None)):
                q = quantize(make(768, 768), *args)
                yield Sample(f"{args} {n} rows", (make(n, 768), *q, make(768)), {})
            yield Sample(f"int8 {n}x816x100", (make(n, 816), *quantize(make(100, 816)), make(100)), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        n, d, out = make.size(70), 32 * make.size(6), make.size(70)
        groups = make.pick(None, *(g for g in (32, 64, 96) if not d % g))
        q = quantize(make(out, d, scale=d**-0.5), make.pick(4, 8), groups, make.pick(True, False))
        x = make.laid_out(n, d, scale=make.pick(0.1, 1, 10))
        return Sample("random", (x, *q, make.pick(None, make(out))), {})

    @staticmethod
    def condition(input, qweight, scales, mins=None, bias=None) -> float:
        """Rounding errors of a sum of D terms grow with √D; s q and m may be larger than their sum w."""
        growth = math.sqrt(input.shape[-1])
        return growth if mins is None else 4 * growth
