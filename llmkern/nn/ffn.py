"""Feed-forward layers: MLP, GatedMLP, and an nn.Sequential that is one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.dispatch import fall_back
from . import plain
from .children import hooked, must_call


class MLP(plain.MLP):
    """Linear, activation, linear as one fused op; arguments and attributes as `llmkern.nn.plain.MLP`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), or any leading dimensions."""
        if reason := must_call(c_fc=self.c_fc, c_proj=self.c_proj):
            fall_back("MLP", reason)
            return super().forward(x)
        return self.dropout(fused(x, self.c_fc, self.activation, self.c_proj))


class GatedMLP(plain.GatedMLP):
    """The gated MLP as one fused op; arguments and attributes as `llmkern.nn.plain.GatedMLP`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), or any leading dimensions."""
        if reason := must_call(c_gate=self.c_gate, c_fc=self.c_fc, c_proj=self.c_proj):
            fall_back("GatedMLP", reason)
            return super().forward(x)
        return self.dropout(fused(x, self.c_fc, self.activation, self.c_proj, self.c_gate))


class SequentialFFN(nn.Sequential):
    """`nn.Sequential(Linear, activation, [Dropout,] Linear[, Dropout])` as one fused op.

    `swap_` gives this class to such a Sequential; layers must not be added or taken away afterwards.
    While training with dropout between the linears, they are called one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(*, D) to (*, D_out)."""
        linear_in, activation, dropout, linear_out, last = parts(self)
        if reason := why_unfused(activation, dropout, linear_in, linear_out):
            fall_back("nn.Sequential", reason)
            return super().forward(input)
        y = fused(input, linear_in, activation_name(activation), linear_out)
        return y if last is None else last(y)


def fused(
    x: Tensor, linear_in: nn.Linear, activation: str, linear_out: nn.Linear, gate: nn.Linear | None = None
) -> Tensor:
    """`ops.ffn` with the weights of linears."""
    weights = linear_in.weight, linear_in.bias, linear_out.weight, linear_out.bias
    if gate is None:
        return ops.ffn(x, *weights, activation)
    return ops.ffn(x, *weights, activation, weight_gate=gate.weight, bias_gate=gate.bias)


def activation_name(f: object) -> str | None:
    """What `ops.ffn` calls `f`, a function or module of torch; None if it does not know it."""
    if isinstance(f, nn.Module) and hooked(f):
        return None
    if type(f) is nn.GELU:
        return "gelu_tanh" if f.approximate == "tanh" else "gelu"
    if type(f) is nn.ReLU or f is F.relu or f is torch.relu:
        return "relu"
    if type(f) is nn.SiLU or f is F.silu:
        return "silu"
    return "gelu" if f is F.gelu else None


def why_unfused(
    activation: object, dropout: nn.Dropout | None, linear_in: nn.Module, linear_out: nn.Module
) -> str | None:
    """Why linear_in, activation, dropout and linear_out cannot run as one op now, or None."""
    if activation_name(activation) is None:
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"the activation is {name}, expected ReLU, GELU or SiLU without hooks"
    if dropout is not None and dropout.training and dropout.p > 0:
        return f"dropout {dropout.p} between its linears while training"
    if dropout is not None and hooked(dropout):
        return "the dropout between its linears has hooks"
    return must_call(linear_in=linear_in, linear_out=linear_out)


def looks_like_ffn(layers: nn.Sequential) -> bool:
    """Whether it is Linear, something without parameters, [Dropout,] Linear[, Dropout]."""
    kinds = [type(layer) for layer in layers]
    if kinds[2:3] == [nn.Dropout]:
        del kinds[2]
    if kinds[3:] == [nn.Dropout]:
        del kinds[3]
    is_ffn = len(kinds) == 3 and issubclass(kinds[0], nn.Linear) and issubclass(kinds[2], nn.Linear)
    return is_ffn and next(layers[1].parameters(), None) is None


def parts(layers: nn.Sequential) -> tuple:
    """(linear, activation, dropout or None, linear, last dropout or None) of what looks like one."""
    first, activation, *rest = layers
    dropout = rest.pop(0) if type(rest[0]) is nn.Dropout else None
    return first, activation, dropout, rest[0], rest[1] if len(rest) == 2 else None
