"""AdamW: every parameter, gradient and moment is read once; one launch for each parameter."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 1024


def adamw_fwd(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    step: int, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float,
) -> None:  # fmt: skip
    """Update params, exp_avgs and exp_avg_sqs in place."""
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs):
        if p.numel():
            launch(
                _kernel, p, (triton.cdiv(p.numel(), BLOCK),),
                p, g, m, v, p.numel(), 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
                rate, root, eps, BLOCK, warps=4,
            )  # fmt: skip


@triton.jit
def _kernel(
    p, g, m, v, N, keep, beta1, grad1, beta2, grad2, rate, root, eps, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(m + at, mask=inside, other=0.0).to(tl.float32) * beta1 + grad * grad1
    second = tl.load(v + at, mask=inside, other=0.0).to(tl.float32) * beta2 + grad * grad * grad2
    step = first * rate / (tl.sqrt_rn(second) * root + eps)
    param = tl.load(p + at, mask=inside, other=0.0).to(tl.float32) * keep - step
    tl.store(p + at, param.to(p.dtype.element_ty), mask=inside)
    tl.store(m + at, first.to(m.dtype.element_ty), mask=inside)
    tl.store(v + at, second.to(v.dtype.element_ty), mask=inside)
