"""LayerNorm and RMSNorm, with an optional residual add in the same kernel."""

from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back
from .children import hooked


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on llmkern's kernels: same arguments, parameters and state_dict keys.

    Source: Ba, Kiros, Hinton 2016, Layer Normalization, arXiv:1607.06450.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `input`, or the sum `input + residual`.

        Args:
            input: (*, *normalized_shape); float32, bfloat16, float16 or float64.
            residual: like `input`.

        Returns:
            y like `input`; with `residual` the pair (y, input + residual).
        """
        if input.is_nested and residual is None:
            fall_back("LayerNorm", "the input is a nested tensor")
            return super().forward(input)
        return ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual
        )


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on llmkern's kernels: same arguments, parameters and state_dict keys.

    Source: Zhang, Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `x`, or the sum `x + residual`.

        Args:
            x: (*, *normalized_shape); float32, bfloat16, float16 or float64.
            residual: like `x`.

        Returns:
            y like `x`; with `residual` the pair (y, x + residual).
        """
        if x.is_nested and residual is None:
            fall_back("RMSNorm", "the input is a nested tensor")
            return super().forward(x)
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps, residual=residual)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual, in one kernel where `norm` allows it.

    Hooks of `norm` must see a call with one tensor, and under autocast the branch may be bfloat16
    while the residual stream is float32: then it is an add and a call.
    """
    if isinstance(norm, (LayerNorm, RMSNorm)) and not hooked(norm) and x.dtype == residual.dtype:
        return norm(x, residual)
    h = x + residual
    return norm(h), h
