"""The output layer of a language model and its loss in one: linear_cross_entropy."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, linear_loss_parts
from .loss import check_targets, loss_factor, reduce_losses
from .op import Make, Op, Sample, autocast, empty, opmath, register
from .scratch import CHUNK, CLASSES, early_rows, product
from .sharding import SUM, Split, wanted


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target)` without the logits in memory.

    As `torch.nn.functional.linear_cross_entropy` for class indices.  Logits exist a tile at a time,
    in float32.  Backward computes them again; but with "mean" or "sum" the C++ kernel, in float32 and
    bfloat16, makes the gradients in forward, where any is needed, and no product twice: evaluate under
    `torch.no_grad()`.  Gradients are exact for any reduction.

    Args:
        input: hidden states, (*, D); float32, bfloat16, float16 or float64.
        linear_weight: (C, D), any strides; C is any number of classes.
        target: class indices, (*); int64, in [0, C) or `ignore_index`.
        linear_bias: (C,).
        weight: (C,), a factor for each class; in the dtype of `input` or float32.
        reduction: "mean" (weighted, over what is not ignored), "sum" or "none".
        ignore_index: targets of this value add nothing to loss or gradient; None is -100.
        label_smoothing: in [0, 1].
        z_loss: adds z_loss · lse² to the loss of each token that is not ignored, lse the log of the
            softmax's denominator; PaLM has 1e-4 (Chowdhery et al. 2022, arXiv:2204.02311, sec. 5).
        softcap: a positive number replaces the logits z by softcap · tanh(z / softcap), as Gemma 2
            (arXiv:2408.00118, sec. 2).

    Returns:
        A scalar, or with "none" a tensor like `target`; in the dtype of `input`, and in float32
        under autocast.  With every target ignored, "mean" is NaN, as in torch.

    Raises:
        ValueError: a wrong shape, dtype or argument.
        IndexError: a target outside [0, C), on the CPU; on a GPU its loss is NaN.
    """
    dtype = input.dtype
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    _check_options(reduction, label_smoothing, z_loss, softcap)
    _check_tensors(input, linear_weight, target, linear_bias, weight)
    ignored = -100 if ignore_index is None else ignore_index
    return reduced_loss(
        input, linear_weight, target, linear_bias, weight, reduction, ignored, label_smoothing, z_loss,
        softcap or 0.0, dtype,
    )  # fmt: skip


def reduced_loss(
    input: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The op on checked tensors, and what `reduction` makes of its losses, in `dtype`."""
    if linear_loss_parts.is_split(head):
        options = ignore_index, float(label_smoothing), float(z_loss), float(softcap)
        losses = linear_loss_parts.losses_of_parts(input, head, bias, target, weight, *options)
        return reduce_losses(losses, dtype, target, weight, ignore_index, reduction)
    flat = input.reshape(target.numel(), input.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    early = [_wants_early(t, reduction) for t in (flat, head, bias)]
    factor = None
    if any(early):
        sums = opmath(input.dtype)
        mean = reduction == "mean"
        factor = loss_factor(sums, target, weight, ignore_index) if mean else input.new_ones((), dtype=sums)
    losses = LINEAR_CROSS_ENTROPY.apply(
        flat, head, bias, target.reshape(-1), None if weight is None else weight.contiguous(), factor,
        ignore_index, float(label_smoothing), float(z_loss), float(softcap), 0, head.shape[0], early,
    ).reshape(target.shape)  # fmt: skip
    return reduce_losses(losses, dtype, target, weight, ignore_index, reduction)


def _wants_early(t: Tensor | None, reduction: str) -> bool:
    """Whether forward makes the gradient of t: where it saves a product, and no scaling lies between.

    float16 has too small a range for gradients that a GradScaler has not yet multiplied.
    """
    if t is None or reduction == "none" or not (torch.is_grad_enabled() and t.requires_grad):
        return False
    return t.dtype in (torch.float32, torch.bfloat16) and dispatch.runs_cpp(t.device.type)


def _check_options(reduction: str, smoothing: float, z_loss: float, softcap: float | None) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"linear_cross_entropy: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'"
        )
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {smoothing}, expected a number in [0, 1]")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}, expected a number of at least 0")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"linear_cross_entropy: softcap is {softcap}, expected a positive number or None")


def _check_tensors(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
) -> None:
    if not input.is_floating_point() or input.dim() == 0:
        raise ValueError(
            f"linear_cross_entropy: input is {input.dtype} of shape {tuple(input.shape)}, expected "
            "floating point of shape (*, D)"
        )
    classes = linear_weight.shape[0] if linear_weight.dim() else 0
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1] or not classes:
        raise ValueError(
            f"linear_cross_entropy: linear_weight has shape {tuple(linear_weight.shape)}, expected "
            f"(C, {input.shape[-1]}) with at least one class"
        )
    if target.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: target is {target.dtype}, expected torch.int64 class indices"
        )
    shapes = {
        "target": (target, input.shape[:-1]),
        "linear_bias": (linear_bias, (classes,)),
        "weight": (weight, (classes,)),
        "linear_weight": (linear_weight, linear_weight.shape),
    }
    for name, (t, shape) in shapes.items():
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(
                f"linear_cross_entropy: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}"
            )
        if t.device != input.device:
            raise ValueError(
                f"linear_cross_entropy: {name} is on {t.device}, expected {input.device} as input"
            )
        if name.startswith("linear") and t.dtype != input.dtype:
            raise ValueError(f"linear_cross_entropy: {name} is {t.dtype}, expected {input.dtype} as input")
    if weight is not None and weight.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"linear_cross_entropy: weight is {weight.dtype}, expected {input.dtype} as input, "
            "or torch.float32"
        )


def _logits(x: Tensor, head: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """(N, C) in the dtype of accumulation."""
    z = F.linear(x, head, bias).to(opmath(x.dtype))
    return softcap * (z / softcap).tanh() if softcap else z


EARLY = ("early_dx", "early_dhead", "early_dbias")


def _gradients_of_rows(needs: list[bool]) -> list[int | str | None]:
    """Where the gradients of x, head and bias are, with rows split."""
    return [wanted(need, where) for need, where in zip(needs, (0, SUM, SUM))]


def places(target: Tensor, ignore_index: int, first: int, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether targets count (N,), their rows of the head (N, 1), whether the head has these (N, 1)."""
    kept = target != ignore_index
    t = (target - first)[:, None]
    here = kept[:, None] & (t >= 0) & (t < head.shape[0])
    return kept, t.where(here, 0), here


@register
class LINEAR_CROSS_ENTROPY(Op):
    """loss = (1 - ε) w[t] (lse - z[t]) + ε/C Σ_c w[c] (lse - z[c]) + ζ lse²,  z = cap(x Wᵀ + b)

    lse = log Σ_c exp(z[c]) is kept as top = max z and log_total = log Σ exp(z - top), like
    cross_entropy's; cap(z) = κ tanh(z / κ), or z without a softcap κ.

    Forward is one product of 2 N C D FLOPs.  Backward is three: 2 N C D for the logits again, and
    4 N C D for dx = dz W and dW = dzᵀ x.  Both gradients are summed in float32 and rounded once.  Where
    forward is told the gradient of its losses, one factor for all, it can make the gradients there; backward
    then only scales them, if it turns out to be a multiple.

    A head may be a part of the layer, its classes from `first` on of `classes`: then loss is a sum over the
    parts, with lse of the part, and without ζ (linear_loss_parts.py).
    """

    name = "linear_cross_entropy"
    family = "linear_loss"
    source = (
        "Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009, sec. 4; "
        "z-loss: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, sec. 5"
    )
    constant = ("weight",)
    gradients = {"x": 0, "head": 1, "bias": 2}
    public = staticmethod(linear_cross_entropy)

    @staticmethod
    def reference(
        x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None,
        factor: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
        first: int, classes: int, early: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        check_targets("linear_cross_entropy", target, classes, ignore_index)
        z = _logits(x, head, bias, softcap)  # (N, C)
        kept, t, here = places(target, ignore_index, first, head)
        w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
        hot = (1 - label_smoothing) * w[target.where(kept, 0)] * here[:, 0]
        w = w[first : first + head.shape[0]]
        top = z.detach().amax(-1)  # (N,)
        z = z - top[:, None]
        log_total = z.exp().sum(-1).log()  # (N,)
        loss = hot * (log_total - z.gather(1, t)[:, 0])
        if label_smoothing:
            loss = loss + label_smoothing / classes * (w * (log_total[:, None] - z)).sum(-1)
        loss = loss + z_loss * (top + log_total).square()
        grads = (empty(x),) * 3
        if factor is not None:
            options = (factor, *grads, ignore_index, label_smoothing, z_loss, softcap, first, classes)
            dloss = factor.expand(target.shape)
            grads = LINEAR_CROSS_ENTROPY.reference_bwd(
                dloss, x, head, bias, target, weight, top, log_total, *options, early
            )
        return torch.where(kept, loss, 0.0), top, log_total, *(g.clone() for g in grads)

    @staticmethod
    def outputs(x, head, bias, *others):
        early = others[-1]
        loss = x.new_empty(x.shape[0], dtype=opmath(x.dtype))
        grads = (x.new_empty(t.shape) if need else empty(x) for t, need in zip((x, head, bias), early))
        return loss, torch.empty_like(loss), torch.empty_like(loss), *grads

    @staticmethod
    def save(args, outs):
        return (*args[:5], *outs[1:3], args[5], *outs[3:], *args[6:-1])

    @staticmethod
    def replay(x, head, bias, target, weight, top, log_total, factor, dx, dhead, dbias, *options):
        return x, head, bias, target, weight, None, *options, [False] * 3

    @staticmethod
    def reference_bwd(
        dloss: Tensor, x: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None,
        top: Tensor, log_total: Tensor, factor: Tensor | None, early_dx: Tensor, early_dhead: Tensor,
        early_dbias: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
        first: int, classes: int, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        z = _logits(x, head, bias, softcap)
        kept, t, here = places(target, ignore_index, first, head)
        w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
        lse = (top + log_total)[:, None]
        hot = (1 - label_smoothing) * w[target.where(kept, 0), None]  # (N, 1), of the target's own term
        smooth = label_smoothing / classes
        dz = (z - top[:, None] - log_total[:, None]).exp() * (hot + smooth * w.sum() + 2 * z_loss * lse)
        dz = dz - smooth * w[first : first + head.shape[0]]
        dz = dz.scatter_add(1, t, -hot * here) * torch.where(kept, dloss, 0.0)[:, None]
        if softcap:
            dz = dz * (1 - (z / softcap).square())
        wide, dz = dz, dz.to(x.dtype)
        grads = dz @ head, dz.t() @ x, wide.sum(0).to(x.dtype)
        return tuple(d if need else empty(x) for d, need in zip(grads, needs))

    @staticmethod
    def outputs_bwd(dloss, x, head, bias, *others):
        needs = others[-1]
        return tuple(x.new_empty(t.shape) if need else empty(x) for t, need in zip((x, head, bias), needs))

    @staticmethod
    def splits(half, args):
        split = dict.fromkeys(("x", "target", "dloss", "top", "log_total"), 0)
        if half == "fwd":
            yield Split(split, (0, 0, 0, *_gradients_of_rows(args["early"])))
            return
        made = [args["factor"] is not None and 0 not in args[name].shape for name in EARLY]
        held = dict(zip(EARLY, _gradients_of_rows(made)))
        yield Split({**split, **held}, tuple(_gradients_of_rows(args["needs"])))

    @staticmethod
    def flops(x, head, *others):
        early = others[-1]
        return 2 * x.shape[0] * head.numel() * (1 + early[0] + early[1])

    @staticmethod
    def flops_bwd(dloss, x, head, bias, target, weight, top, log_total, factor, *others):
        needs = others[-1]
        return 2 * x.shape[0] * head.numel() * (1 + needs[0] + needs[1]) if factor is None else 0

    @staticmethod
    def scratch(half, args):
        x, (classes, dim) = args["x"], args["head"].shape
        size, count, cols = x.element_size(), x.shape[0], min(CLASSES, classes)
        rows = min(CHUNK, count)
        made_early = half == "fwd" and any(args["early"])
        if half == "bwd" and args["factor"] is not None:
            return 0  # forward made the gradients
        if made_early:
            rows = early_rows(count)
            own = rows * (4 * classes + size * cols + 4 * dim + 4 * dim)  # the last: x in panels
        elif half == "fwd":
            return 4 * rows * cols + product(rows, cols, dim)
        else:
            own = size * rows * cols + 4 * cols * dim  # the last: the head's block in panels, once more
        if size < 4:  # sums of gradients in float32, or their lower halves
            own += 2 * classes * dim if made_early else 4 * (count + cols) * dim
        return own + max(product(rows, cols, dim), product(cols, dim, rows))

    @staticmethod
    def eager(
        input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
        label_smoothing=0.0, z_loss=0.0, softcap=None,
    ):  # fmt: skip
        """F.linear and F.cross_entropy, which torch's own linear_cross_entropy is by default."""
        ignored = -100 if ignore_index is None else ignore_index
        z = F.linear(input, linear_weight, linear_bias)
        z = softcap * (z / softcap).tanh() if softcap else z
        z, flat = z.reshape(-1, z.shape[-1]), target.reshape(-1)
        loss = F.cross_entropy(z, flat, weight, None, ignored, None, reduction, label_smoothing)
        if reduction == "none":
            loss = loss.reshape(target.shape)
        if not z_loss:
            return loss
        kept = flat != ignored
        extra = torch.where(kept, z_loss * z.logsumexp(-1).square(), 0.0)
        if reduction == "none":
            return loss + extra.reshape(target.shape)
        share = kept if weight is None else kept * weight[flat.where(kept, 0)]
        return loss + (extra.sum() / share.sum() if reduction == "mean" else extra.sum())

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        def layer(n, d, c):
            return make(n, d), make(c, d, scale=2 * max(1, d) ** -0.5), make.integers(c, n)

        for n, d, c in ((9, 16, 33), (20, 37, 71), (5, 8, 300), (3, 4, 1), (1, 1, 2)):
            yield Sample(f"{n}x{c}x{d}", layer(n, d, c), {})
        for reduction in ("sum", "none"):
            yield Sample(reduction, layer(9, 16, 33), {"reduction": reduction, "linear_bias": make(33)})
        yield Sample("one row", (make(16), make(33, 16), make.integers(33)), {})
        x, head, target = layer(12, 16, 33)
        yield Sample("batch", (x.view(3, 4, 16), head, target.view(3, 4)), {"reduction": "none"})
        yield Sample("weight", (x, head, target), {"weight": make(33).abs()})
        yield Sample("smoothing", (x, head, target), {"label_smoothing": 0.1})
        yield Sample("z-loss", (x, head, target), {"z_loss": 1e-2})
        yield Sample("softcap", (x, head, target), {"softcap": 3.0})
        everything = {"linear_bias": make(33), "weight": make(33).abs(), "label_smoothing": 0.2}
        everything |= {"ignore_index": 3, "z_loss": 1e-3, "softcap": 5.0}
        yield Sample("everything", layer(40, 8, 33), everything)
        ignored = torch.where(make.integers(2, 12) == 1, -100, target)
        yield Sample("some ignored", (x, head, ignored), {"reduction": "sum"})
        yield Sample("large logits", (100 * x, head, target), {})
        yield Sample("common offset", (x, head, target), {"linear_bias": make(33) + 256.0})
        transposed = make(24, 16).t()[:, ::2], make(12, 33).t(), make.integers(33, 16)
        yield Sample("transposed", transposed, {})
        yield Sample("empty", layer(0, 16, 33), {"reduction": "sum"})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n, c, d in ((2048, 50257, 768), (8192, 4096, 512)):
            args = make(n, d), make(c, d, scale=d**-0.5), make.integers(c, n)
            yield Sample(f"{n}x{c}x{d}", args, {})

    @staticmethod
    def variants(make: Make) -> Iterator[Sample]:
        args = make(256, 768), make(50257, 768), make.integers(50257, 256)
        kwargs = {"weight": make(50257), "linear_bias": make(50257), "z_loss": 1e-4, "softcap": 30.0}
        yield Sample("everything", args, kwargs | {"label_smoothing": 0.1})

    @staticmethod
    def draw(make: Make) -> Sample:
        n, d, c = make.size(30), make.size(50), make.size(200)
        target = torch.where(make.integers(4, n) == 0, make.pick(-100, 0), make.integers(c, n))
        head = make.laid_out(c, d, scale=make.pick(0.1, 1, 3) * d**-0.5)
        kwargs = {"reduction": make.pick("sum", "none"), "label_smoothing": make.pick(0.0, 0.1)}
        kwargs |= {"z_loss": make.pick(0.0, 1e-2), "softcap": make.pick(None, 4.0)}
        kwargs |= {"linear_bias": make.pick(None, make(c)), "weight": make.pick(None, make(c).abs())}
        return Sample("random", (make.laid_out(n, d), head, target), kwargs)

    @staticmethod
    def condition(input, linear_weight, target, **kwargs) -> float:
        """The largest |x·w| possible, by which a rounding of a logit moves an exponential; √N for sums."""
        if not input.numel():
            return 0.0
        largest = (input.norm(dim=-1).max() * linear_weight.norm(dim=-1).max()).item()
        return largest + math.sqrt(target.numel())
