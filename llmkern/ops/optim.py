"""AdamW: one step of all parameters in one pass, and the norm of all gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import philox, sharding
from .op import Op, Sample, opmath, register
from .optim_state import blocks, dequantize_state, quantize_state


def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    step: int, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999,
    weight_decay: float = 1e-2, eps: float = 1e-8, *,
    max_exp_avg_sqs: list[Tensor] | None = None, masters: list[Tensor] | None = None,
    exp_avg_scales: list[Tensor] | None = None, exp_avg_sq_scales: list[Tensor] | None = None,
    grad_scale: Tensor | None = None, seed: Tensor | None = None, maximize: bool = False,
) -> None:  # fmt: skip
    """One AdamW step, in place; weight decay comes before the update, as in `torch.optim.AdamW`.

    Args:
        params: any shapes; float32, bfloat16, float16 or float64; written to.
        grads: for each parameter one of its shape and dtype.
        exp_avgs, exp_avg_sqs: for each parameter one of its shape, all of the parameters' dtype, all
            float32, or all uint8, as `quantize_state` makes them; written to.
        step: number of this step, from 1.
        max_exp_avg_sqs: like exp_avg_sqs, written to: AMSGrad.
        masters: for each parameter its value in float32; written to, and the parameter is it rounded.
        exp_avg_scales, exp_avg_sq_scales: for uint8 states the scales of their blocks of 256 elements,
            float32; written to.
        grad_scale: float32, one element: a factor of all gradients, such as that of clipping.
        seed: int64, one element: bfloat16 parameters are rounded up or down at random, with the
            probabilities that make the mean right (stochastic rounding); else to nearest.
        maximize: climb instead of descend.

    Raises:
        ValueError: lists that do not match, or a tensor that is written to and not contiguous.
    """
    optional = max_exp_avg_sqs, masters, exp_avg_scales, exp_avg_sq_scales
    optional = tuple(many or [] for many in optional)
    _check(params, grads, exp_avgs, exp_avg_sqs, *optional)
    if step < 1:
        raise ValueError(f"adamw: step is {step}, expected at least 1")
    if seed is not None and any(p.dtype != torch.bfloat16 for p in params):
        raise ValueError("adamw: seed is given and a parameter is not bfloat16, expected bfloat16 parameters")
    if any(map(sharding.is_sharded, params)):
        params, grads, exp_avgs, exp_avg_sqs, *optional = _parts(
            params, grads, exp_avgs, exp_avg_sqs, *optional
        )
    if params:
        ADAMW.apply(
            params, [g.contiguous() for g in grads], exp_avgs, exp_avg_sqs, *optional,
            grad_scale, seed, step, lr, beta1, beta2, weight_decay, eps, maximize,
        )  # fmt: skip


def _parts(params: list[Tensor], grads: list[Tensor], *states: list[Tensor]) -> Iterator[list[Tensor]]:
    """This process's parts of DTensors: a step looks at no other element."""
    for many in (params, grads, *states):
        for p, t in zip(params, many):
            if many is not grads and getattr(t, "placements", None) != getattr(p, "placements", None):
                raise ValueError("adamw: a state is not split as its parameter is, expected both alike")
        yield [
            t.redistribute(placements=p.placements).to_local() if sharding.is_sharded(p) else t
            for p, t in zip(params, many)
        ]


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, as `torch.nn.utils.get_total_norm`.

    Args:
        grads: any shapes and floating-point dtypes, on one device.

    Returns:
        A scalar in float32 (float64 for float64); the sum runs in a fixed order, for any number of threads.

    Raises:
        ValueError: no tensor, or tensors on several devices.
    """
    if not grads:
        raise ValueError("grad_norm: grads is empty, expected at least one tensor")
    _one_device("grad_norm", grads)
    if any(map(sharding.is_sharded, grads)):
        return _norm_of_parts(grads)
    return GRAD_NORM.apply([g.contiguous() for g in grads])


def _norm_of_parts(grads: list[Tensor]) -> Tensor:
    """Of DTensors too: the norms of the parts of those that are split alike, then the norm of these norms."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    together: dict[tuple, list[Tensor]] = {}
    for g in grads:
        key: tuple = (None,)
        if sharding.is_sharded(g):
            split = [p if p.is_shard() else Replicate() for p in g.placements]
            key, g = (g.device_mesh, *split), g.redistribute(placements=split).to_local()
        together.setdefault(key, []).append(g.contiguous())
    squares = []
    for (mesh, *split), parts in together.items():
        square = GRAD_NORM.apply(parts).square()
        if mesh is not None:
            terms = [Partial() if p.is_shard() else p for p in split]
            square = DTensor.from_local(square, mesh, terms, run_check=False).full_tensor()
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _one_device(op: str, tensors: list[Tensor]) -> None:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors are on {', '.join(sorted(map(str, devices)))}, expected one device")


def _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, exp_avg_scales, exp_avg_sq_scales):
    states = exp_avgs[0].dtype if exp_avgs else None
    coded = states == torch.uint8
    lists = {
        "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs,
        "masters": masters, "exp_avg_scales": exp_avg_scales, "exp_avg_sq_scales": exp_avg_sq_scales,
    }  # fmt: skip
    for name, many in lists.items():
        scales = name.endswith("scales")
        if not many and (name in ("max_exp_avg_sqs", "masters") or (scales and not coded)):
            continue
        if len(many) != len(params):
            raise ValueError(f"adamw: {name} has {len(many)} tensors, expected {len(params)} as params")
        for p, t in zip(params, many):
            f = opmath(p.dtype)
            dtype = f if scales or name == "masters" else p.dtype if name == "grads" else states
            shape = (blocks(p),) if scales else p.shape
            if t.shape != shape or t.dtype != dtype:
                raise ValueError(
                    f"adamw: {name} has {t.dtype} of shape {tuple(t.shape)}, "
                    f"expected {dtype} of shape {tuple(shape)}"
                )
    if any(states not in (p.dtype, torch.float32, torch.uint8) for p in params):
        raise ValueError(
            f"adamw: exp_avgs has {states}, expected the parameters' dtype, torch.float32 or torch.uint8"
        )
    if coded and max_exp_avg_sqs:
        raise ValueError("adamw: max_exp_avg_sqs is given with states in 8 bits, expected none")
    if not all(t.is_contiguous() for many in (params, *lists.values()) if many is not grads for t in many):
        raise ValueError("adamw: params, exp_avgs or exp_avg_sqs has strides, expected contiguous tensors")
    _one_device("adamw", [*params, *grads, *exp_avgs])


@register
class ADAMW(Op):
    """p = (1 - lr weight_decay) p - lr m̂ / (sqrt(v̂) + eps),  m̂ = m / (1 - beta1^t),  v̂ = v / (1 - beta2^t)

    m and v are the running means of g and g², in 8 bits too: a step reads them from their codes, and rounds
    the new ones to codes after the parameter has been moved by them.
    """

    name = "adamw"
    family = "optim"
    source = (
        "Loshchilov, Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101, alg. 2; Reddi et "
        "al. 2018, On the Convergence of Adam and Beyond, arXiv:1904.09237, alg. 2; Dettmers et al. 2022, "
        "8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, sec. 2"
    )
    constant = (
        "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "exp_avg_scales",
        "exp_avg_sq_scales", "grad_scale",
    )  # fmt: skip
    mutates = (
        "params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "exp_avg_scales",
        "exp_avg_sq_scales",
    )  # fmt: skip
    public = staticmethod(adamw)

    @staticmethod
    def reference(
        params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor], masters: list[Tensor], exp_avg_scales: list[Tensor],
        exp_avg_sq_scales: list[Tensor], grad_scale: Tensor | None, seed: Tensor | None, step: int, lr: float,
        beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool,
    ) -> None:  # fmt: skip
        scales = exp_avg_scales, exp_avg_sq_scales
        moments = _moments(exp_avgs, exp_avg_sqs, *scales)
        for i, (p, g, m, v) in enumerate(zip(params, grads, *moments)):
            f = opmath(p.dtype)
            grad = g.to(f) * (-1 if maximize else 1)
            if grad_scale is not None:
                grad = grad * grad_scale.to(f)
            first = m.to(f) * beta1 + grad * (1 - beta1)
            second = v.to(f) * beta2 + grad.square() * (1 - beta2)
            _keep(first, second, exp_avgs[i], exp_avg_sqs[i], *(many[i] for many in scales if many))
            if max_exp_avg_sqs:
                second = torch.maximum(max_exp_avg_sqs[i].to(f), second)
                max_exp_avg_sqs[i].copy_(second)
            root = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
            value = masters[i].to(f) if masters else p.to(f)
            value = value * (1 - lr * weight_decay) - first * (lr / (1 - beta1**step)) / root
            if masters:
                masters[i].copy_(value)
            p.copy_(value if seed is None else _round_at_random(value, seed, i))

    @staticmethod
    def outputs(params, *rest):
        return None

    @staticmethod
    def flops(params, *rest):
        return 14 * sum(p.numel() for p in params)

    @staticmethod
    def eager(
        params, grads, exp_avgs, exp_avg_sqs, step,
        lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=1e-2, eps=1e-8, *,
        max_exp_avg_sqs=None, masters=None, exp_avg_scales=None, exp_avg_sq_scales=None, grad_scale=None,
        seed=None, maximize=False,
    ):  # fmt: skip
        codes = exp_avgs, exp_avg_sqs
        exp_avgs, exp_avg_sqs = _moments(*codes, exp_avg_scales, exp_avg_sq_scales)
        steps = [torch.tensor(float(step - 1)) for _ in params]
        if grad_scale is not None:
            grads = [(g * grad_scale).to(g.dtype) for g in grads]
        same = exp_avgs[0].dtype == params[0].dtype
        values = masters or (params if same else [p.to(exp_avgs[0].dtype) for p in params])
        torch.optim._functional.adamw(
            values, [g.to(t.dtype) for g, t in zip(grads, values)], exp_avgs, exp_avg_sqs,
            max_exp_avg_sqs or [], steps, foreach=False, amsgrad=bool(max_exp_avg_sqs), beta1=beta1,
            beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=maximize,
        )  # fmt: skip
        for i, (p, value) in enumerate(zip(params, values)):
            if p is not value:
                p.copy_(value if seed is None else _round_at_random(value, seed, i))
        if exp_avg_scales:
            for kept in zip(exp_avgs, exp_avg_sqs, *codes, exp_avg_scales, exp_avg_sq_scales):
                _keep(*kept)

    @staticmethod
    def samples(make):
        for sizes in ((64,), (7, 33), (1,), (0, 5), (1025, 2), (16,), (17, 31, 64)):
            yield Sample(f"sizes {sizes}", _lists(make, *sizes), {"step": 3})
        yield Sample("first step", _lists(make, 40), {"step": 1, "lr": 0.1, "weight_decay": 0.1})
        lists = _lists(make, 40, 70)
        yield Sample(
            "AMSGrad", lists, {"step": 3, "max_exp_avg_sqs": [2 * t for t in _lists(make, 40, 70)[3]]}
        )
        yield Sample("maximize", _lists(make, 40), {"step": 3, "maximize": True})
        clip = make(1).float().abs().view(())
        yield Sample("scaled", _lists(make, 5, 70), {"step": 3, "grad_scale": clip})
        p, g, m, v = _lists(make, 33, 100)
        m, v = ([t.to(opmath(make.dtype)) for t in many] for many in (m, v))
        yield Sample("float32 states", (p, g, m, v), {"step": 3})
        masters = {"masters": [t.to(opmath(make.dtype)) for t in p]}
        yield Sample(
            "masters", tuple([t.clone() for t in many] for many in (p, g, m, v)), {"step": 3, **masters}
        )
        for sizes in ((40,), (256, 0, 1), (300, 3000)):
            yield _coded(f"8 bits, {sizes}", _lists(make, *sizes))
        yield _coded("8 bits, masters", _lists(make, 33, 700), masters=True)
        yield _coded("8 bits, zeros", tuple([0 * t for t in many] for many in _lists(make, 300)))

    @staticmethod
    def draw(make):
        p, g, m, v = _lists(make, *(make.size(300) for _ in range(make.size(4))))
        kwargs = {"step": make.size(50), "lr": make.pick(1e-3, 0.1), "weight_decay": make.pick(0.0, 0.1)}
        kwargs |= {"maximize": make.pick(False, True), "eps": make.pick(1e-8, 1e-3)}
        if make.pick(0, 1):
            kwargs["max_exp_avg_sqs"] = [t * make.pick(0.5, 2) for t in v]
        if make.pick(0, 1):
            kwargs["grad_scale"] = make(1).float().abs().view(())
        return Sample("random", (p, g, m, v), kwargs)

    @staticmethod
    def benchmarks(make):
        yield Sample("one of 4 Mi", _lists(make, 2**22), {"step": 10})
        yield Sample("64 of 64 Ki", _lists(make, *[2**16] * 64), {"step": 10})

    @staticmethod
    def variants(make):
        p, g, m, v = _lists(make, 4096, 4096)
        m, v = [t.float() for t in m], [t.float() for t in v]
        options = {"max_exp_avg_sqs": [t.clone() for t in v], "masters": [t.float() for t in p]}
        yield Sample("all", (p, g, m, v), {"step": 3, "grad_scale": make(1).float().view(()), **options})
        yield _coded("8 bits", _lists(make, 4096, 4096), masters=True)
        if make.dtype == torch.bfloat16:
            seed = torch.tensor(5, device=make.device)
            yield Sample("rounded at random", (p, g, m, v), {"step": 3, "seed": seed})


@register
class GRAD_NORM(Op):
    """sqrt(Σ g²) over all elements of all tensors"""

    name = "grad_norm"
    family = "optim"
    source = "Pascanu et al. 2013, On the difficulty of training Recurrent Neural Networks, arXiv:1211.5063"
    constant = ("grads",)
    public = staticmethod(grad_norm)

    @staticmethod
    def reference(grads: list[Tensor]) -> Tensor:
        f = opmath(grads[0].dtype)
        return torch.stack([g.to(f).square().sum() for g in grads]).sum().sqrt()

    @staticmethod
    def outputs(grads):
        return grads[0].new_empty((), dtype=opmath(grads[0].dtype))

    @staticmethod
    def flops(grads):
        return 2 * sum(g.numel() for g in grads)

    @staticmethod
    def eager(grads):
        return torch.nn.utils.get_total_norm([g.to(opmath(g.dtype)) for g in grads])

    @staticmethod
    def samples(make):
        for sizes in ((64,), (7, 33), (1,), (0, 5), (40000, 2), (17, 31, 64)):
            yield Sample(f"sizes {sizes}", ([make(n) for n in sizes],), {})
        yield Sample("zeros", ([make(9) * 0],), {})
        yield Sample("a matrix and its transpose", ([(x := make(5, 9)), x.t()],), {})

    @staticmethod
    def draw(make):
        scale = make.pick(1e-3, 1, 1e3)
        return Sample("random", ([make(make.size(500), scale=scale) for _ in range(make.size(5))],), {})

    @staticmethod
    def benchmarks(make):
        yield Sample("one of 4 Mi", ([make(2**22)],), {})
        yield Sample("64 of 64 Ki", ([make(2**16) for _ in range(64)],), {})


def _lists(make, *sizes: int) -> tuple[list[Tensor], ...]:
    p, g, m, v = ([make(n) for n in sizes] for _ in range(4))
    return p, g, m, [t.square() for t in v]


def _coded(label: str, lists: tuple[list[Tensor], ...], masters: bool = False) -> Sample:
    """A sample with states in 8 bits."""
    p, g, m, v = lists
    (m, m_scales), (v, v_scales) = (
        [list(each) for each in zip(*(quantize_state(t, signed) for t in many))]
        for many, signed in ((m, True), (v, False))
    )
    kwargs = {"step": 3, "exp_avg_scales": m_scales, "exp_avg_sq_scales": v_scales}
    if masters:
        kwargs["masters"] = [t.to(opmath(t.dtype)) for t in p]
    return Sample(label, (p, g, m, v), kwargs)


def _moments(exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales) -> tuple[list[Tensor], list[Tensor]]:
    """The moments as numbers: themselves, unless they are codes."""
    if not exp_avg_scales:
        return exp_avgs, exp_avg_sqs
    return (
        [dequantize_state(*each, signed=True) for each in zip(exp_avgs, exp_avg_scales)],
        [dequantize_state(*each, signed=False) for each in zip(exp_avg_sqs, exp_avg_sq_scales)],
    )


def _keep(first, second, exp_avg, exp_avg_sq, *scales) -> None:
    """Write new moments where they are kept: as numbers, or with scales as codes."""
    if not scales:
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)
        return
    for new, codes, scale, signed in (
        (first, exp_avg, scales[0], True),
        (second, exp_avg_sq, scales[1], False),
    ):
        new_codes, new_scale = quantize_state(new, signed)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def _round_at_random(x: Tensor, seed: Tensor, row: int) -> Tensor:
    """float32 to bfloat16, up with the probability of the fraction: 16 random bits of place (row, i).

    Infinities and NaN keep their bits.
    """
    at = torch.arange(x.numel(), device=x.device)
    noise = philox.words(seed, torch.full_like(at, row), at) >> 16
    bits = x.float().flatten().view(torch.int32).long() & 0xFFFFFFFF
    cut = (torch.where(x.flatten().isfinite(), bits + noise, bits) & 0xFFFF0000) << 32 >> 32
    return cut.to(torch.int32).view(torch.float32).view(x.shape)
