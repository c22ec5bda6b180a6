"""Losses: cross_entropy."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, autocast_enabled, opmath, register
from .sharding import Split


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and class indices, as `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (N, C) or (C,) or (N, C, d1, ...); float32, bfloat16, float16 or float64.
        target: class indices, (N,) or () or (N, d1, ...); int64, in [0, C) or `ignore_index`.
        weight: (C,), a factor for each class; in the dtype of `input` or float32.
        ignore_index: targets of this value add nothing to loss or gradient.
        reduction: "mean" (weighted, over what is not ignored), "sum" or "none".
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or with "none" a tensor like `target`; in the dtype of `input`, and in float32
        under autocast.  With every target ignored, "mean" is NaN, as in torch.

    Raises:
        ValueError: a wrong shape, dtype or argument.
        IndexError: a target outside [0, C), on the CPU; on a GPU its loss is NaN.
    """
    _check(input, target, weight, reduction, label_smoothing)
    weight = None if weight is None else weight.contiguous()
    logits = input if input.dim() <= 2 else input.movedim(1, -1)
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    flat = target.reshape(-1)
    logits = logits.reshape(-1, classes).contiguous()
    losses = CROSS_ENTROPY.apply(logits, flat, weight, ignore_index, float(label_smoothing))  # (N,) float32
    losses = losses.reshape(target.shape)
    return reduce_losses(losses, input.dtype, target, weight, ignore_index, reduction)


def reduce_losses(
    losses: Tensor, dtype: torch.dtype, target: Tensor, weight: Tensor | None, ignore_index: int,
    reduction: str,
) -> Tensor:  # fmt: skip
    """The result of a loss from those of its tokens: in `dtype`, and under autocast in float32, as torch."""
    if autocast_enabled(losses.device.type):
        dtype = losses.dtype
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total * loss_factor(losses.dtype, target, weight, ignore_index)
    return total.to(dtype)


def loss_factor(dtype: torch.dtype, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What the "mean" multiplies the sum of all losses by: 1 / Σ w[t] over what is not ignored."""
    kept = target != ignore_index
    share = kept if weight is None else kept * weight[target.where(kept, 0)]
    return 1 / share.sum(dtype=dtype)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing is {smoothing}, expected a number in [0, 1]")
    if not input.is_floating_point() or input.dim() == 0:
        raise ValueError(
            f"cross_entropy: input is {input.dtype} with {input.dim()} dimensions, expected "
            "floating-point logits of shape (N, C), (C,) or (N, C, d1, ...)"
        )
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if classes == 0:
        raise ValueError(f"cross_entropy: input has shape {tuple(input.shape)}, expected at least one class")
    if target.dtype != torch.int64:
        raise ValueError(f"cross_entropy: target is {target.dtype}, expected torch.int64 class indices")
    expected = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    if target.shape != expected:
        raise ValueError(
            f"cross_entropy: target has shape {tuple(target.shape)}, expected {tuple(expected)} "
            f"for input of shape {tuple(input.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"cross_entropy: target is on {target.device}, expected {input.device} as input")
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ValueError(
            f"cross_entropy: weight has shape {tuple(weight.shape)}, expected ({classes},), one a class"
        )
    if weight is not None and weight.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"cross_entropy: weight is {weight.dtype}, expected {input.dtype} as input, or torch.float32"
        )


def check_targets(function: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for a target outside [0, classes); on the CPU only: elsewhere it would synchronise."""
    if target.device.type != "cpu":
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise IndexError(
            f"{function}: target {int(target[bad][0])} is out of range, expected 0 to {classes - 1} "
            f"or ignore_index {ignore_index}"
        )


@register
class CROSS_ENTROPY(Op):
    """loss = (1 - ε) w[t] (lse - z[t]) + ε/C Σ_c w[c] (lse - z[c]),  lse = log Σ_c exp(z[c])

    z is a row of logits, t its target, ε the label smoothing, w the class weights.  lse is kept as
    its two terms, top = max z and log_total = log Σ exp(z - top): added up in float32 they would
    lose the digits that the loss of large logits is made of.
    """

    name = "cross_entropy"
    family = "loss"
    source = "Szegedy et al. 2016, Rethinking the Inception Architecture, arXiv:1512.00567, sec. 7"
    constant = ("weight",)
    gradients = {"logits": 0}
    public = staticmethod(cross_entropy)

    @staticmethod
    def reference(
        logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        f = opmath(logits.dtype)
        z = logits.to(f)  # (N, C)
        classes = z.shape[1]
        check_targets("cross_entropy", target, classes, ignore_index)
        kept = target != ignore_index
        t = target.where(kept, 0)[:, None]  # (N, 1)
        w = z.new_ones(classes) if weight is None else weight.to(f)
        top = z.detach().amax(-1)  # (N,)
        z = z - top[:, None]
        log_total = z.exp().sum(-1).log()  # (N,)
        loss = (1 - label_smoothing) * w[t[:, 0]] * (log_total - z.gather(1, t)[:, 0])
        if label_smoothing:
            loss = loss + label_smoothing / classes * (w * (log_total[:, None] - z)).sum(-1)
        return torch.where(kept, loss, 0.0), top, log_total

    @staticmethod
    def outputs(logits, target, weight, ignore_index, label_smoothing):
        loss = logits.new_empty(logits.shape[0], dtype=opmath(logits.dtype))
        return loss, torch.empty_like(loss), torch.empty_like(loss)

    @staticmethod
    def save(args, outs):
        logits, target, weight, ignore_index, label_smoothing = args
        return logits, target, weight, outs[1], outs[2], ignore_index, label_smoothing

    @staticmethod
    def replay(logits, target, weight, top, log_total, ignore_index, label_smoothing):
        return logits, target, weight, ignore_index, label_smoothing

    @staticmethod
    def reference_bwd(
        dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, top: Tensor,
        log_total: Tensor, ignore_index: int, label_smoothing: float, needs: list[bool],
    ) -> Tensor:  # fmt: skip
        f = top.dtype
        classes = logits.shape[1]
        kept = target != ignore_index
        t = target.where(kept, 0)[:, None]
        w = top.new_ones(classes) if weight is None else weight.to(f)
        p = (logits.to(f) - top[:, None] - log_total[:, None]).exp()
        hot = (1 - label_smoothing) * w[t]  # (N, 1), the weight of the target's own term
        smooth = label_smoothing / classes
        dz = p * (hot + smooth * w.sum()) - smooth * w
        dz = dz.scatter_add(1, t, -hot)
        return (dz * torch.where(kept, dloss, 0.0)[:, None]).to(logits.dtype)

    @staticmethod
    def outputs_bwd(dloss, logits, target, weight, top, log_total, ignore_index, label_smoothing, needs):
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @staticmethod
    def splits(half, args):
        split = dict.fromkeys(("logits", "target", "dloss", "top", "log_total"), 0)
        yield Split(split, (0, 0, 0) if half == "fwd" else (0,))

    @staticmethod
    def flops(logits, target, weight, ignore_index, label_smoothing):
        return logits.numel() * 4

    @staticmethod
    def flops_bwd(dloss, logits, target, weight, top, log_total, ignore_index, label_smoothing, needs):
        return logits.numel() * 4

    @staticmethod
    def eager(*args, **kwargs):
        return F.cross_entropy(*args, **kwargs)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for n, c in ((7, 65), (5, 1000), (3, 1), (2, 50257), (64, 17)):
            yield Sample(f"{n}x{c}", (make(n, c), make.integers(c, n)), {})
        for reduction in ("sum", "none"):
            yield Sample(reduction, (make(9, 33), make.integers(33, 9)), {"reduction": reduction})
        yield Sample("one row", (make(33), make.integers(33)), {})
        yield Sample("images", (make(3, 11, 4, 5), make.integers(11, 3, 4, 5)), {})
        yield Sample("weight", (make(9, 33), make.integers(33, 9), make(33).abs()), {})
        yield Sample("smoothing", (make(9, 33), make.integers(33, 9)), {"label_smoothing": 0.1})
        kwargs = {"label_smoothing": 0.2, "ignore_index": 3}
        yield Sample("everything", (make(40, 7), make.integers(7, 40), make(7).abs()), kwargs)
        ignored = torch.where(make.integers(2, 9) == 1, -100, make.integers(33, 9))
        yield Sample("some ignored", (make(9, 33), ignored), {"reduction": "sum"})
        yield Sample("huge logits", (make(9, 33, scale=1e4), make.integers(33, 9)), {})
        yield Sample("common offset", (make(9, 33) + 1e4, make.integers(33, 9)), {})
        yield Sample("transposed", (make(33, 9).t(), make.integers(33, 9)), {})
        yield Sample("empty", (make(0, 33), make.integers(33, 0)), {"reduction": "sum"})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n, c in ((2048, 50257), (8192, 4096)):
            yield Sample(f"{n}x{c}", (make(n, c), make.integers(c, n)), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        n, c = make.size(30), make.size(400)
        z = make.laid_out(n, c, scale=make.pick(0.1, 1, 20)) + make.pick(0, 0, 50)
        target = torch.where(make.integers(4, n) == 0, make.pick(-100, 0), make.integers(c, n))
        kwargs = {"reduction": make.pick("sum", "none"), "label_smoothing": make.pick(0.0, 0.1)}
        return Sample("random", (z, target, make.pick(None, make(c).abs())), kwargs)

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        args = make(64, 50257), make.integers(50257, 64), make(50257)
        yield Sample("weight and smoothing", args, {"label_smoothing": 0.1})
