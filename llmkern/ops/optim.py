"""AdamW: one step of all parameters in one pass."""

import torch
from torch import Tensor

from .op import Op, Sample, opmath, register


def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    step: int, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999,
    weight_decay: float = 1e-2, eps: float = 1e-8,
) -> None:  # fmt: skip
    """One AdamW step, in place; weight decay comes before the update, as in `torch.optim.AdamW`.

    Args:
        params: any shapes; float32, bfloat16, float16 or float64; written to.
        grads, exp_avgs, exp_avg_sqs: for each parameter one of its shape and dtype; all but the
            gradients are written to.
        step: number of this step, from 1.

    Raises:
        ValueError: lists that do not match, or a tensor that is written to and not contiguous.
    """
    for name, many in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if len(many) != len(params):
            raise ValueError(f"adamw: {name} has {len(many)} tensors, expected {len(params)} as params")
        for p, t in zip(params, many):
            if t.shape != p.shape or t.dtype != p.dtype:
                raise ValueError(
                    f"adamw: {name} has {t.dtype} of shape {tuple(t.shape)}, "
                    f"expected {p.dtype} of shape {tuple(p.shape)}"
                )
    if step < 1:
        raise ValueError(f"adamw: step is {step}, expected at least 1")
    if not all(t.is_contiguous() for many in (params, exp_avgs, exp_avg_sqs) for t in many):
        raise ValueError("adamw: params, exp_avgs or exp_avg_sqs has strides, expected contiguous tensors")
    if params:
        grads = [g.contiguous() for g in grads]
        ADAMW.apply(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, weight_decay, eps)


@register
class ADAMW(Op):
    """p = (1 - lr weight_decay) p - lr m̂ / (sqrt(v̂) + eps),  m̂ = m / (1 - beta1^t),  v̂ = v / (1 - beta2^t)

    m and v are the running means of g and g².
    """

    name = "adamw"
    family = "optim"
    source = "Loshchilov, Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101, alg. 2"
    constant = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    mutates = ("params", "exp_avgs", "exp_avg_sqs")
    public = staticmethod(adamw)

    @staticmethod
    def reference(
        params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        step: int, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float,
    ) -> None:  # fmt: skip
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs):
            f = opmath(p.dtype)
            first = m.to(f) * beta1 + g.to(f) * (1 - beta1)
            second = v.to(f) * beta2 + g.to(f).square() * (1 - beta2)
            root = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
            p.copy_(p.to(f) * (1 - lr * weight_decay) - first * (lr / (1 - beta1**step)) / root)
            m.copy_(first)
            v.copy_(second)

    @staticmethod
    def outputs(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, weight_decay, eps):
        return None

    @staticmethod
    def flops(params, *rest):
        return 14 * sum(p.numel() for p in params)

    @staticmethod
    def eager(
        params, grads, exp_avgs, exp_avg_sqs, step,
        lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=1e-2, eps=1e-8,
    ):  # fmt: skip
        steps = [torch.tensor(float(step - 1)) for _ in params]
        torch.optim._functional.adamw(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=False, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip

    @staticmethod
    def samples(make):
        for sizes in ((64,), (7, 33), (1,), (0, 5), (1025, 2), (16,), (17, 31, 64)):
            yield Sample(f"sizes {sizes}", _lists(make, *sizes), {"step": 3})
        yield Sample("first step", _lists(make, 40), {"step": 1, "lr": 0.1, "weight_decay": 0.1})

    @staticmethod
    def benchmarks(make):
        yield Sample("one of 4 Mi", _lists(make, 2**22), {"step": 10})
        yield Sample("64 of 64 Ki", _lists(make, *[2**16] * 64), {"step": 10})


def _lists(make, *sizes: int) -> tuple[list[Tensor], ...]:
    p, g, m, v = ([make(n) for n in sizes] for _ in range(4))
    return p, g, m, [t.square() for t in v]
