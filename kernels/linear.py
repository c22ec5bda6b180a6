"""Linear layer: three matrix products and a column sum."""

from torch import Tensor

from .gemm import gemm
from .reduce import column_sum


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x Wᵀ + b; x (N, D), weight (D_out, D) with any strides, y (N, D_out)."""
    gemm(x, weight.t(), y, bias)


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool],
    dx: Tensor, dweight: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    """Gradients of linear_fwd from dy (N, D_out); those that nobody wants have no elements."""
    gemm(dy, weight, dx)
    gemm(dy.t(), x, dweight)
    column_sum(dy, dbias)
