"""Feed-forward layers: MLP, GatedMLP, and an nn.Sequential that is one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from . import plain
from .children import hooked, must_call, unfused


class MLP(plain.MLP):
    """Linear, activation, linear as one fused op; arguments and attributes as `llmkern.nn.plain.MLP`."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, T, C) to (B, T, C), or any leading dimensions; `residual` is added to the result."""
        if reason := must_call(c_fc=self.c_fc, c_proj=self.c_proj):
            unfused("MLP", reason, self.c_fc, self.c_proj)
            y = super().forward(x)
            return y if residual is None else residual + y
        return fused(x, self.c_fc, self.activation, self.c_proj, last=self.dropout, residual=residual)


class GatedMLP(plain.GatedMLP):
    """The gated MLP as one fused op; arguments and attributes as `llmkern.nn.plain.GatedMLP`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), or any leading dimensions."""
        if reason := must_call(c_gate=self.c_gate, c_fc=self.c_fc, c_proj=self.c_proj):
            unfused("GatedMLP", reason, self.c_gate, self.c_fc, self.c_proj)
            return super().forward(x)
        return fused(x, self.c_fc, self.activation, self.c_proj, self.c_gate, last=self.dropout)


class SequentialFFN(nn.Sequential):
    """`nn.Sequential(Linear, activation, [Dropout,] Linear[, Dropout])` as one fused op.

    `swap_` gives this class to such a Sequential; layers must not be added or taken away afterwards.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(*, D) to (*, D_out)."""
        linear_in, activation, dropout, linear_out, last = parts(self)
        if reason := why_unfused(activation, dropout, linear_in, linear_out):
            unfused("nn.Sequential", reason, linear_in, linear_out)
            return super().forward(input)
        return fused(input, linear_in, activation_name(activation), linear_out, dropout=dropout, last=last)


def fused(
    x: Tensor,
    linear_in: nn.Linear,
    activation: str,
    linear_out: nn.Linear,
    gate: nn.Linear | None = None,
    *,
    dropout: nn.Dropout | None = None,
    last: nn.Dropout | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`ops.ffn` with the weights of linears, `dropout` between them and `last` behind them.

    What is dropped while training is as random as torch's, but not the same.
    """
    outside = last is not None and hooked(last)  # hooks see what its caller sees
    y = ops.ffn(
        x, linear_in.weight, linear_in.bias, linear_out.weight, linear_out.bias, activation,
        weight_gate=None if gate is None else gate.weight,
        bias_gate=None if gate is None else gate.bias,
        residual=None if outside else residual,
        dropout_p=_rate(dropout),
        output_dropout_p=0.0 if outside else _rate(last),
    )  # fmt: skip
    if not outside:
        return y
    return last(y) if residual is None else residual + last(y)


def _rate(dropout: nn.Dropout | None) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


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
