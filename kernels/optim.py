"""AdamW and the gradients' norm: one launch for many tensors, each element read once.

A table holds the address of every tensor and where its blocks begin; a program finds its tensor by
halving.  The table is small and goes to the device without waiting for it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import launch
from .optim_state import BLOCK as STATE_BLOCK
from .optim_state import decoded, encode, values
from .philox import words

_POINTERS = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8,
}  # fmt: skip


def adamw_fwd(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], masters: list[Tensor], exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor], grad_scale: Tensor | None, seed: Tensor | None, step: int, lr: float,
    beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool,
) -> None:  # fmt: skip
    """Update all but the gradients in place; lists behind exp_avg_sqs may be empty."""
    lists = [params, grads, exp_avgs, exp_avg_sqs]
    lists += [many or params for many in (max_exp_avg_sqs, masters, exp_avg_scales, exp_avg_sq_scales)]
    codes = values(params[0].device) if exp_avg_scales else None
    for dtype in dict.fromkeys(p.dtype for p in params):
        rows = [i for i, p in enumerate(params) if p.dtype == dtype and p.numel()]
        if not rows:
            continue
        table, blocks, aligned = _table([[many[i] for i in rows] for many in lists], rows)
        launch(
            _adamw_kernel, params[0], (blocks,),
            table, len(rows), codes, grad_scale, seed, -1.0 if maximize else 1.0, 1 - lr * weight_decay,
            beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps,
            _POINTERS[dtype], _POINTERS[exp_avgs[rows[0]].dtype], bool(max_exp_avg_sqs), bool(masters),
            aligned, config.OPTIM_BLOCK, warps=config.warps(config.OPTIM_BLOCK),
        )  # fmt: skip


def grad_norm_fwd(grads: list[Tensor], norm: Tensor) -> None:
    """norm = sqrt of the sum of all squares; blocks are summed apart, then in order."""
    sums = []
    for dtype in dict.fromkeys(g.dtype for g in grads):
        many = [g for g in grads if g.dtype == dtype and g.numel()]
        if not many:
            continue
        table, blocks, aligned = _table([many], range(len(many)))
        partial = norm.new_empty(blocks)
        launch(
            _squares_kernel, norm, (blocks,), table, len(many), partial, _POINTERS[dtype], aligned,
            config.OPTIM_BLOCK, warps=config.warps(config.OPTIM_BLOCK),
        )  # fmt: skip
        sums.append(partial)
    norm.copy_(torch.cat(sums).sum().sqrt() if sums else norm.new_zeros(()))


def _table(lists: list[list[Tensor]], rows: Sequence[int]) -> tuple[Tensor, int, bool]:
    """(int64 table, blocks in all, whether every address is a multiple of 16).

    The table's rows, as long as there are tensors: the first block, the number of elements, the row of
    random numbers, then the addresses of each list.
    """
    first, firsts = 0, []
    for t in lists[0]:
        firsts.append(first)
        first += triton.cdiv(t.numel(), config.OPTIM_BLOCK)
    addresses = [[t.data_ptr() for t in many] for many in lists]
    numbers = torch.tensor([firsts, [t.numel() for t in lists[0]], list(rows), *addresses])
    aligned = all(a % 16 == 0 for many in addresses for a in many)
    device = lists[0][0].device
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True), first, aligned


@triton.jit
def _tensor_of(table, count, BLOCK: tl.constexpr):
    """(tensor of this program, its first element, the tensor's size).

    A block that lies in its tensor needs no mask; the size, which the compiler does not know, would keep it
    from accesses of 16 bytes.
    """
    block = tl.program_id(0)
    low, high = 0, count
    while high - low > 1:  # the last tensor whose first block is not behind this one
        middle = (low + high) // 2
        if tl.load(table + middle) <= block:
            low = middle
        else:
            high = middle
    return low, (block - tl.load(table + low)) * BLOCK, tl.load(table + count + low)


@triton.jit
def _address(table, count, which, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + (3 + which) * count + tensor).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _round_at_random(x, seed, row, at):
    """float32 to a bfloat16, up with the probability of the fraction; infinities and NaN stay."""
    noise = words(seed, row + tl.zeros_like(at), at) >> 16
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = (bits + tl.where(finite, noise.to(tl.uint32), 0).to(tl.uint32)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _adamw_kernel(
    table, count, codes, grad_scale, seed, sign, keep, beta1, grad1, beta2, grad2, rate, root, eps,
    P: tl.constexpr, S: tl.constexpr, AMSGRAD: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, at, size = _tensor_of(table, count, BLOCK)
    if at + BLOCK <= size:
        _adamw_block(
            table, count, tensor, at + tl.arange(0, BLOCK), tl.full((BLOCK,), 1, tl.int1), codes, grad_scale,
            seed, sign, keep, beta1, grad1, beta2, grad2, rate, root, eps, P, S, AMSGRAD, MASTERS,
            ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        elements = at + tl.arange(0, BLOCK)
        _adamw_block(
            table, count, tensor, elements, elements < size, codes, grad_scale,
            seed, sign, keep, beta1, grad1, beta2, grad2, rate, root, eps, P, S, AMSGRAD, MASTERS,
            ALIGNED, BLOCK,
        )  # fmt: skip


@triton.jit
def _adamw_block(
    table, count, tensor, at, inside, codes, grad_scale, seed, sign, keep, beta1, grad1, beta2, grad2, rate,
    root, eps, P: tl.constexpr, S: tl.constexpr, AMSGRAD: tl.constexpr, MASTERS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = _address(table, count, 0, tensor, P, ALIGNED) + at
    g = _address(table, count, 1, tensor, P, ALIGNED) + at
    m, v = _address(table, count, 2, tensor, S, ALIGNED), _address(table, count, 3, tensor, S, ALIGNED)
    if codes is not None:
        m_scales = _address(table, count, 6, tensor, tl.float32, ALIGNED)
        v_scales = _address(table, count, 7, tensor, tl.float32, ALIGNED)
        before_m = decoded(m, m_scales, codes, at, inside, True)
        before_v = decoded(v, v_scales, codes, at, inside, False)
    else:
        before_m = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
        before_v = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    factor = sign
    if grad_scale is not None:
        factor *= tl.load(grad_scale)
    grad = tl.load(g, mask=inside, other=0.0).to(tl.float32) * factor
    first = before_m * beta1 + grad * grad1
    second = before_v * beta2 + grad * grad * grad2
    if codes is not None:
        encode(first, m, m_scales, at, inside, BLOCK // STATE_BLOCK, True)
        encode(second, v, v_scales, at, inside, BLOCK // STATE_BLOCK, False)
    else:
        tl.store(m + at, first.to(S), mask=inside)
        tl.store(v + at, second.to(S), mask=inside)
    if AMSGRAD:
        largest = _address(table, count, 4, tensor, S, ALIGNED) + at
        before = tl.load(largest, mask=inside, other=0.0).to(tl.float32)
        second = tl.where(before > second, before, second)  # NaN stays
        tl.store(largest, second.to(S), mask=inside)
    step = first * rate / (tl.sqrt_rn(second) * root + eps)
    if MASTERS:
        master = _address(table, count, 5, tensor, tl.float32, ALIGNED) + at
        value = tl.load(master, mask=inside, other=0.0) * keep - step
        tl.store(master, value, mask=inside)
    else:
        value = tl.load(p, mask=inside, other=0.0).to(tl.float32) * keep - step
    if seed is not None:
        value = _round_at_random(value, tl.load(seed), tl.load(table + 2 * count + tensor), at)
    tl.store(p, value.to(P), mask=inside)


@triton.jit
def _squares_kernel(
    table, count, partial, P: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    tensor, at, size = _tensor_of(table, count, BLOCK)
    x = _address(table, count, 0, tensor, P, ALIGNED) + at + tl.arange(0, BLOCK)
    if at + BLOCK <= size:
        values = tl.load(x).to(tl.float32)
    else:
        values = tl.load(x, mask=at + tl.arange(0, BLOCK) < size, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(values * values, 0))
