"""Feed-forward layer: activation, gate and bias in the epilogue of the first matrix product.

Backward makes the hidden activations again from what the first product kept, in the epilogue of
dh = dy W_out, so they are never stored between forward and backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .activation import activate, derivative
from .gemm import add_bias, blocks, gemm, product, tile_at, tile_position
from .launch import launch
from .reduce import column_sum


def ffn_fwd(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
    bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, activation: str, keep: bool,
    y: Tensor, u: Tensor, g: Tensor,
) -> None:  # fmt: skip
    """y = h W_outᵀ + b_out, h = f(u) or f(g) ∘ u, u = x W_inᵀ + b_in, g = x W_gateᵀ + b_gate.

    x (N, D) contiguous; weights (F, D) and (D_out, F), any strides; y (N, D_out); u and g (N, F) are
    written only for `keep`.
    """
    h = x.new_empty(x.shape[0], weight_in.shape[0])
    _hidden(x, weight_in, bias_in, weight_gate, bias_gate, activation, h, u, g)
    gemm(h, weight_out.t(), y, bias_out)


def ffn_bwd(
    dy: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
    bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, u: Tensor, g: Tensor,
    activation: str, needs: list[bool],
    dx: Tensor, dweight_in: Tensor, dbias_in: Tensor, dweight_gate: Tensor, dbias_gate: Tensor,
    dweight_out: Tensor, dbias_out: Tensor,
) -> None:  # fmt: skip
    """Gradients of ffn_fwd from dy (N, D_out); those that nobody wants have no elements."""
    if any(needs[:6]):  # all but the output's bias go through the hidden layer
        h, du = torch.empty_like(u), torch.empty_like(u)
        dg = torch.empty_like(u) if weight_gate is not None else None
        _hidden_bwd(dy, weight_out, u, g, activation, h, du, dg)
        gemm(du, weight_in, dx, None, dg, weight_gate)
        for grad, dweight, dbias in ((du, dweight_in, dbias_in), (dg, dweight_gate, dbias_gate)):
            if grad is not None:
                gemm(grad.t(), x, dweight)
                column_sum(grad, dbias)
        gemm(dy.t(), h, dweight_out)
    column_sum(dy, dbias_out)


def _hidden(x, weight_in, bias_in, weight_gate, bias_gate, activation, h, u, g) -> None:
    (m, n), k = h.shape, x.shape[1]
    if not h.numel():
        return
    gated = weight_gate is not None
    tile, sizes = blocks(x, m, n, k, heavy=gated)
    launch(
        _hidden_kernel, x, (triton.cdiv(m, sizes[0]) * triton.cdiv(n, sizes[1]),),
        x, weight_in, bias_in, weight_gate, bias_gate, h,
        u if u.numel() else None, g if g.numel() else None,
        m, n, k, *weight_in.stride(), *(weight_gate.stride() if gated else (0, 0)),
        bias_in.stride(0) if bias_in is not None else 0,
        bias_gate.stride(0) if bias_gate is not None else 0,
        activation, *sizes, config.GEMM_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _hidden_bwd(dy, weight_out, u, g, activation, h, du, dg) -> None:
    (m, n), k = u.shape, dy.shape[1]
    if not u.numel():
        return
    tile, sizes = blocks(dy, m, n, k, heavy=True)
    launch(
        _hidden_bwd_kernel, dy, (triton.cdiv(m, sizes[0]) * triton.cdiv(n, sizes[1]),),
        dy, weight_out, u, g if dg is not None else None, h, du, dg,
        m, n, k, *dy.stride(), *weight_out.stride(), activation, *sizes, config.GEMM_GROUP,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _hidden_kernel(
    x, weight_in, bias_in, weight_gate, bias_gate, h, u_out, g_out, M, N, K,
    in_n, in_k, gate_n, gate_k, bias_in_n, bias_gate_n, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    rows, cols = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    at, inside = tile_at(rows, cols, M, N)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = product(zero, x, weight_in, rows, cols, M, N, K, K, 1, in_k, in_n, BLOCK_K, EVEN_K)
    u = add_bias(u, bias_in, bias_in_n, cols, N)
    if u_out is not None:
        tl.store(u_out + at, u.to(u_out.dtype.element_ty), mask=inside)
    if weight_gate is not None:
        g = product(zero, x, weight_gate, rows, cols, M, N, K, K, 1, gate_k, gate_n, BLOCK_K, EVEN_K)
        g = add_bias(g, bias_gate, bias_gate_n, cols, N)
        if g_out is not None:
            tl.store(g_out + at, g.to(g_out.dtype.element_ty), mask=inside)
        value = activate(g, F) * u
    else:
        value = activate(u, F)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_bwd_kernel(
    dy, weight_out, u_in, g_in, h, du, dg, M, N, K, dy_m, dy_k, out_k, out_n, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    rows, cols = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    at, inside = tile_at(rows, cols, M, N)
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dh = product(dh, dy, weight_out, rows, cols, M, N, K, dy_m, dy_k, out_k, out_n, BLOCK_K, EVEN_K)
    u = tl.load(u_in + at, mask=inside, other=0.0).to(tl.float32)
    if g_in is not None:
        g = tl.load(g_in + at, mask=inside, other=0.0).to(tl.float32)
        gate = activate(g, F)
        tl.store(dg + at, (dh * u * derivative(g, F)).to(dg.dtype.element_ty), mask=inside)
        tl.store(du + at, (dh * gate).to(du.dtype.element_ty), mask=inside)
        tl.store(h + at, (gate * u).to(h.dtype.element_ty), mask=inside)
    else:
        tl.store(du + at, (dh * derivative(u, F)).to(du.dtype.element_ty), mask=inside)
        tl.store(h + at, activate(u, F).to(h.dtype.element_ty), mask=inside)
