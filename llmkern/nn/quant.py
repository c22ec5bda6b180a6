"""QuantLinear: a linear layer whose weight is kept in 8 or 4 bits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.quant_weight import QuantWeight, depth, dequantize, quantize


class QuantLinear(nn.Module):
    """y = x Wᵀ + b with a weight in 8 or 4 bits, which is not trained; the bias and x have gradients.

    Args:
        weight: (D_out, D) in 8 or 4 bits, as `llmkern.ops.quantize` or a GGUF file gives it.
        bias: (D_out,) a tensor, or a Parameter, which is then kept as it is; or None.

    `.to(bfloat16)` casts the bias alone: x and the bias meet in one dtype, the weight stays what it is.

    Attributes:
        qweight, scales, mins: buffers, laid out as in `llmkern.ops.quantize`; mins may be None.
        bias: Parameter or None.
        in_features, out_features: D and D_out.
    """

    def __init__(self, weight: QuantWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.qweight.shape[0], depth(weight.qweight)
        for name, tensor in weight._asdict().items():
            self.register_buffer(name, tensor)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: object) -> "QuantLinear":
        """The layer with its weight quantised; options as `llmkern.ops.quantize`'s."""
        return cls(quantize(linear.weight, **options), linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) to (*, out_features)."""
        return ops.quant_linear(input, self.qweight, self.scales, self.mins, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that it computes with, (out_features, in_features)."""
        return dequantize(self.qweight, self.scales, self.mins, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Scales and mins are moved, not cast: in another dtype they would mean other weights."""
        dtype = self.scales.dtype
        before = {name: getattr(self, name) for name in ("scales", "mins")}
        super()._apply(fn, recurse)
        for name, was in before.items():
            now = getattr(self, name)
            if now is not None and now.dtype != dtype:
                setattr(self, name, was.to(now.device))
        return self

    def extra_repr(self) -> str:
        """What stands between the brackets when it is printed."""
        bits = 4 if self.qweight.dtype == torch.uint8 else 8
        group = self.in_features // self.scales.shape[1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={bits}, group_size={group}, symmetric={self.mins is None}"
        )
