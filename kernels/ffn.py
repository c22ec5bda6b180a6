"""Feed-forward layer: activation, gate and bias in the epilogue of the first matrix product.

Backward makes the hidden activations again from what the first product kept, in the epilogue of
dh = dy W_out, so they are never stored between forward and backward.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .activation import activate, derivative
from .gemm import add_bias, blocks, gemm, programs, tile_at, tile_origin
from .gemm_operands import operands, product
from .launch import fit, launch
from .philox import Drop, drop, dropped
from .reduce import column_sum

OUTPUT_ROWS = 2**62  # of numbers for dropout of the outputs: behind those of hidden activations


def ffn_fwd(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
    bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, residual: Tensor | None,
    seed: Tensor | None, activation: str, dropout_p: float, output_dropout_p: float, keep: bool,
    y: Tensor, u: Tensor, g: Tensor,
) -> None:  # fmt: skip
    """y = residual + drop(h W_outᵀ + b_out), h = drop(f(u) or f(g) ∘ u), u = x W_inᵀ + b_in,
    g = x W_gateᵀ + b_gate.

    x (N, D), y and residual (N, D_out) contiguous; weights (F, D) and (D_out, F), any strides; u and
    g (N, F) are written only for `keep`.
    """
    for part in chunks(x.shape[0], y.shape[0] if keep else config.FFN_CHUNK):
        h = x.new_empty(part.stop - part.start, weight_in.shape[0])
        hidden_drop = drop(seed, dropout_p, part.start)
        _hidden(x[part], weight_in, bias_in, weight_gate, bias_gate, activation, hidden_drop, h, u, g)
        output_drop = drop(seed, output_dropout_p, OUTPUT_ROWS + part.start)
        added = None if residual is None else residual[part]
        gemm(h, weight_out.t(), y[part], bias_out, residual=added, drop=output_drop)


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Chunks of rows, so that the hidden activations of all rows are never there together."""
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(rows, start + size))


def ffn_bwd(
    dy: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
    bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, seed: Tensor | None,
    u: Tensor, g: Tensor, activation: str, dropout_p: float, output_dropout_p: float, needs: list[bool],
    dx: Tensor, *dparams: Tensor,
) -> None:  # fmt: skip
    """Gradients of ffn_fwd from dy (N, D_out); those that nobody wants have no elements.

    With u and g not kept they are made again, chunk by chunk; the gradients of the parameters are then
    summed over the chunks in float32.
    """
    weights = weight_in, bias_in, weight_gate, bias_gate, weight_out
    parts = list(chunks(x.shape[0], x.shape[0] if u.numel() else config.FFN_CHUNK))
    sums = [d if len(parts) == 1 else torch.zeros_like(d, dtype=torch.float32) for d in dparams]
    for part in parts:
        grads = sums if len(parts) == 1 else [torch.empty_like(s) for s in sums]
        kept = (u[part], g[part] if g.numel() else g) if u.numel() else _again(x[part], *weights[:4])
        drops = drop(seed, dropout_p, part.start), drop(seed, output_dropout_p, OUTPUT_ROWS + part.start)
        _backward(dy[part], x[part], *weights, *kept, activation, drops, needs, dx[part], *grads)
        for total, grad in zip(sums, grads):
            if total is not grad:
                total += grad
    for d, total in zip(dparams, sums):
        if d is not total or not parts:
            d.copy_(total) if parts else d.zero_()


def _again(x, weight_in, bias_in, weight_gate, bias_gate) -> tuple[Tensor, Tensor]:
    """u and g, as forward had them."""
    u = x.new_empty(x.shape[0], weight_in.shape[0])
    g = torch.empty_like(u) if weight_gate is not None else x.new_empty(0)
    gemm(x, weight_in.t(), u, bias_in)
    if weight_gate is not None:
        gemm(x, weight_gate.t(), g, bias_gate)
    return u, g


def _backward(
    dy, x, weight_in, bias_in, weight_gate, bias_gate, weight_out, u, g, activation, drops, needs,
    dx, dweight_in, dbias_in, dweight_gate, dbias_gate, dweight_out, dbias_out,
) -> None:  # fmt: skip
    hidden_drop, output_drop = drops
    if output_drop.seed is not None:
        dy = _dropped_copy(dy, output_drop)
    if any(needs[:6]):  # all but the output's bias go through the hidden layer
        h, du = torch.empty_like(u), torch.empty_like(u)
        dg = torch.empty_like(u) if weight_gate is not None else None
        _hidden_bwd(dy, weight_out, u, g, activation, hidden_drop, h, du, dg)
        gemm(du, weight_in, dx, None, dg, weight_gate)
        for grad, dweight, dbias in ((du, dweight_in, dbias_in), (dg, dweight_gate, dbias_gate)):
            if grad is not None:
                gemm(grad.t(), x, dweight)
                column_sum(grad, dbias)
        gemm(dy.t(), h, dweight_out)
    column_sum(dy, dbias_out)


def _dropped_copy(x: Tensor, drop: Drop) -> Tensor:
    out = x.new_empty(x.shape)
    rows, cols = x.shape
    block = fit(cols, 16, config.DROP_BLOCK)
    launch(
        _drop_kernel, x, (rows, triton.cdiv(cols, block)), x, out, cols, *x.stride(), *drop, block, warps=4
    )
    return out


@triton.jit
def _drop_kernel(x, out, N, x_m, x_n, seed, first_row, threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_m + cols.to(tl.int64) * x_n, mask=cols < N, other=0.0).to(tl.float32)
    value = dropped(value, seed, first_row + row, cols, threshold, scale)
    tl.store(out + row * N + cols, value.to(out.dtype.element_ty), mask=cols < N)


def _hidden(x, weight_in, bias_in, weight_gate, bias_gate, activation, drop, h, u, g) -> None:
    (m, n), k = h.shape, x.shape[1]
    if not h.numel():
        return
    gated = weight_gate is not None
    tile, sizes = blocks(x, m, n, k, heavy=gated + (drop.seed is not None))
    gate = (x, weight_gate.t()) if gated else (None, None)
    read = operands(sizes, (x, weight_in.t()), gate)
    count = triton.cdiv(m, sizes[0]) * triton.cdiv(n, sizes[1])
    launch(
        _hidden_kernel, x, (programs(x, count, read),),
        *read.args, bias_in, bias_gate, h, u if u.numel() else None, g if g.numel() else None,
        m, n, k, *read.strides, bias_in.stride(0) if bias_in is not None else 0,
        bias_gate.stride(0) if bias_gate is not None else 0, *drop, activation, *sizes,
        config.GEMM_GROUP, read.loads, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _hidden_bwd(dy, weight_out, u, g, activation, drop, h, du, dg) -> None:
    (m, n), k = u.shape, dy.shape[1]
    if not u.numel():
        return
    tile, sizes = blocks(dy, m, n, k, heavy=1 + (drop.seed is not None))
    read = operands(sizes, (dy, weight_out))
    count = triton.cdiv(m, sizes[0]) * triton.cdiv(n, sizes[1])
    launch(
        _hidden_bwd_kernel, dy, (programs(dy, count, read),),
        *read.args, u, g if dg is not None else None, h, du, dg, m, n, k, *read.strides, *drop,
        activation, *sizes, config.GEMM_GROUP, read.loads, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _hidden_kernel(
    x, weight_in, x_again, weight_gate, bias_in, bias_gate, h, u_out, g_out, M, N, K,
    x_m, x_k, in_k, in_n, again_m, again_k, gate_k, gate_n, bias_in_n, bias_gate_n,
    seed, first_row, threshold, scale, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=LOADS != "pointers"):
        row, col = tile_origin(index, M, N, BLOCK_M, BLOCK_N, GROUP)
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        at, inside = tile_at(rows, cols, M, N)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        u = product(
            zero, x, weight_in, row, col, 0, K, M, N, K, x_m, x_k, in_k, in_n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
        )  # fmt: skip
        u = add_bias(u, bias_in, bias_in_n, cols, N)
        if u_out is not None:
            tl.store(u_out + at, u.to(u_out.dtype.element_ty), mask=inside)
        if weight_gate is not None:
            g = product(
                zero, x_again, weight_gate, row, col, 0, K, M, N, K, again_m, again_k, gate_k, gate_n,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
            )  # fmt: skip
            g = add_bias(g, bias_gate, bias_gate_n, cols, N)
            if g_out is not None:
                tl.store(g_out + at, g.to(g_out.dtype.element_ty), mask=inside)
            value = activate(g, F) * u
        else:
            value = activate(u, F)
        value = dropped(value, seed, first_row + rows.to(tl.int64)[:, None], cols[None, :], threshold, scale)
        tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_bwd_kernel(
    dy, weight_out, u_in, g_in, h, du, dg, M, N, K, dy_m, dy_k, out_k, out_n,
    seed, first_row, threshold, scale, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=LOADS != "pointers"):
        row, col = tile_origin(index, M, N, BLOCK_M, BLOCK_N, GROUP)
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        at, inside = tile_at(rows, cols, M, N)
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dh = product(
            dh, dy, weight_out, row, col, 0, K, M, N, K, dy_m, dy_k, out_k, out_n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, LOADS,
        )  # fmt: skip
        places = first_row + rows.to(tl.int64)[:, None]
        dh = dropped(dh, seed, places, cols[None, :], threshold, scale)
        u = tl.load(u_in + at, mask=inside, other=0.0).to(tl.float32)
        if g_in is not None:
            g = tl.load(g_in + at, mask=inside, other=0.0).to(tl.float32)
            gate = activate(g, F)
            value = gate * u
            tl.store(dg + at, (dh * u * derivative(g, F)).to(dg.dtype.element_ty), mask=inside)
            tl.store(du + at, (dh * gate).to(du.dtype.element_ty), mask=inside)
        else:
            value = activate(u, F)
            tl.store(du + at, (dh * derivative(u, F)).to(du.dtype.element_ty), mask=inside)
        value = dropped(value, seed, places, cols[None, :], threshold, scale)
        tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)
