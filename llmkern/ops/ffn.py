"""Feed-forward networks: linear, activation, linear, with or without a gate."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Make, Op, Sample, autocast, empty, opmath, register, rows

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
GATED = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}  # Shazeer 2020


def ffn(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    activation: str = "gelu",
    *,
    weight_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
) -> Tensor:
    """The feed-forward layer of a transformer: two linears with an activation between them.

    y = a(x) @ weight_outᵀ + bias_out, where u = x @ weight_inᵀ + bias_in and a(x) is f(u), or with
    a gate g = x @ weight_gateᵀ + bias_gate the product f(g) ∘ u.

    Args:
        x: (*, D); float32, bfloat16, float16 or float64.
        weight_in, bias_in: (F, D) and (F,), any strides (a `.t()` of (D, F) costs nothing).
        weight_out, bias_out: (D_out, F) and (D_out,).
        activation: f: "relu", "gelu" (exact), "gelu_tanh", "silu" or "relu2" (relu squared);
            or, with a gate, "reglu", "geglu" or "swiglu".
        weight_gate, bias_gate: like weight_in and bias_in.

    Returns:
        y, (*, D_out), in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown activation.
    """
    f = GATED.get(activation, activation)
    tensors = autocast(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out)
    _check(activation, f, *tensors)
    x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out = tensors
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    flat = x.reshape(rows(x, x.shape[-1]), x.shape[-1]).contiguous()
    y = FFN.apply(flat, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, f, keep)
    return y.view(*x.shape[:-1], weight_out.shape[0])


def _check(activation, f, x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out) -> None:
    if f not in ACTIVATIONS:
        raise ValueError(
            f"ffn: activation is {activation!r}, expected one of {', '.join((*ACTIVATIONS, *GATED))}"
        )
    if activation in GATED and weight_gate is None:
        raise ValueError(f"ffn: activation {activation!r} has a gate, expected weight_gate")
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"ffn: x is {x.dtype} of shape {tuple(x.shape)}, expected floating point of shape (*, D)"
        )
    if weight_in.dim() != 2 or weight_out.dim() != 2:
        raise ValueError(
            f"ffn: weight_in has {weight_in.dim()} and weight_out {weight_out.dim()} dimensions, expected 2"
        )
    wide, dim = weight_in.shape[0], x.shape[-1]
    expected = {
        "weight_in": (weight_in, (wide, dim)),
        "bias_in": (bias_in, (wide,)),
        "weight_gate": (weight_gate, (wide, dim)),
        "bias_gate": (bias_gate, (wide,)),
        "weight_out": (weight_out, (weight_out.shape[0], wide)),
        "bias_out": (bias_out, (weight_out.shape[0],)),
    }
    for name, (t, shape) in expected.items():
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"ffn: {name} has shape {tuple(t.shape)}, expected {shape}")
        if t.dtype != x.dtype:
            raise ValueError(f"ffn: {name} is {t.dtype}, expected {x.dtype} as x")
        if t.device != x.device:
            raise ValueError(f"ffn: {name} is on {t.device}, expected {x.device} as x")
    if bias_gate is not None and weight_gate is None:
        raise ValueError("ffn: bias_gate is given without weight_gate")


def activate(u: Tensor, f: str) -> Tensor:
    """f(u), by its formula; gelu: Hendrycks, Gimpel 2016, arXiv:1606.08415, sec. 2."""
    if f == "relu":
        return u.relu()
    if f == "relu2":
        return u.relu().square()
    if f == "silu":
        return u * u.sigmoid()
    if f == "gelu":
        return 0.5 * u * (1 + (u / math.sqrt(2)).erf())
    return 0.5 * u * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh())


def derivative(u: Tensor, f: str) -> Tensor:
    """f'(u)."""
    if f == "relu":
        return (u > 0).to(u.dtype)
    if f == "relu2":
        return 2 * u.relu()
    if f == "silu":
        s = u.sigmoid()
        return s * (1 + u * (1 - s))
    if f == "gelu":
        return 0.5 * (1 + (u / math.sqrt(2)).erf()) + u * (-0.5 * u * u).exp() / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = (c * (u + 0.044715 * u**3)).tanh()
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * c * (1 + 3 * 0.044715 * u * u)


@register
class FFN(Op):
    """y = h W_outᵀ + b_out,  h = f(u) or f(g) ∘ u,  u = x W_inᵀ + b_in,  g = x W_gateᵀ + b_gate

    Bias and activation run in the epilogue of the first product, and their derivatives in the
    epilogue of backward's.  Backward keeps u (and g) and makes h again from them, so one hidden
    activation less is stored than by separate modules.
    """

    name = "ffn"
    family = "ffn"
    lowers = True
    source = (
        "Vaswani et al. 2017, arXiv:1706.03762, eq. 2; "
        "gated: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, eq. 5 and 6"
    )
    gradients = {
        "x": 0, "weight_in": 1, "bias_in": 2, "weight_gate": 3, "bias_gate": 4, "weight_out": 5,
        "bias_out": 6,
    }  # fmt: skip
    public = staticmethod(ffn)

    @staticmethod
    def reference(
        x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
        bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, activation: str, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        f = opmath(x.dtype)
        u = F.linear(x, weight_in, bias_in)  # (N, F)
        g = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
        h = activate(u.to(f), activation) if g is None else activate(g.to(f), activation) * u.to(f)
        y = F.linear(h.to(x.dtype), weight_out, bias_out)  # (N, D_out)
        return y, u if keep else empty(x), g if keep and g is not None else empty(x)

    @staticmethod
    def outputs(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, activation, keep):
        wide = x.new_empty(x.shape[0], weight_in.shape[0]) if keep else empty(x)
        gate = torch.empty_like(wide) if weight_gate is not None else empty(x)
        return x.new_empty(x.shape[0], weight_out.shape[0]), wide, gate

    @staticmethod
    def save(args, outs):
        x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, activation, _ = args
        return (
            x,
            weight_in,
            bias_in,
            weight_gate,
            bias_gate,
            weight_out,
            bias_out,
            outs[1],
            outs[2],
            activation,
        )

    @staticmethod
    def replay(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, u, g, activation):
        return x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, activation, True

    @staticmethod
    def reference_bwd(
        dy: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
        bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, u: Tensor, g: Tensor,
        activation: str, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        f = opmath(x.dtype)
        dh = (dy @ weight_out).to(f)  # (N, F)
        if weight_gate is None:
            h = activate(u.to(f), activation)
            du, dg = (dh * derivative(u.to(f), activation)).to(x.dtype), None
        else:
            gate = activate(g.to(f), activation)
            h = gate * u.to(f)
            du, dg = (dh * gate).to(x.dtype), (dh * u * derivative(g.to(f), activation)).to(x.dtype)
        dx = du @ weight_in if dg is None else du @ weight_in + dg @ weight_gate
        grads = (
            dx,
            du.t() @ x,
            du.to(f).sum(0).to(x.dtype),
            None if dg is None else dg.t() @ x,
            None if dg is None else dg.to(f).sum(0).to(x.dtype),
            dy.t() @ h.to(x.dtype),
            dy.to(f).sum(0).to(x.dtype),
        )
        return tuple(d.contiguous() if need and d is not None else empty(x) for d, need in zip(grads, needs))

    @staticmethod
    def outputs_bwd(
        dy, x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, u, g, activation, needs
    ):
        like = (x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out)
        return tuple(
            x.new_empty(t.shape) if need and t is not None else empty(x) for t, need in zip(like, needs)
        )

    @staticmethod
    def flops(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, activation, keep):
        products = weight_in.numel() * (1 if weight_gate is None else 2) + weight_out.numel()
        return 2 * x.shape[0] * products

    @staticmethod
    def flops_bwd(
        dy, x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, u, g, activation, needs
    ):
        gate = 0 if weight_gate is None else weight_gate.numel()
        inputs = weight_out.numel() + needs[0] * (weight_in.numel() + gate)
        weights = needs[1] * weight_in.numel() + needs[3] * gate + needs[5] * weight_out.numel()
        return 2 * x.shape[0] * (inputs + weights)

    @staticmethod
    def eager(
        x, weight_in, bias_in, weight_out, bias_out, activation="gelu", *, weight_gate=None, bias_gate=None
    ):
        f = GATED.get(activation, activation)
        act = {
            "relu": F.relu,
            "gelu": F.gelu,
            "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
            "silu": F.silu,
            "relu2": lambda t: F.relu(t).square(),
        }[f]
        u = F.linear(x, weight_in, bias_in)
        h = act(u) if weight_gate is None else act(F.linear(x, weight_gate, bias_gate)) * u
        return F.linear(h, weight_out, bias_out)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        def layer(n, d, f, out=None):
            out = out or d
            s = 1 / math.sqrt(d)
            return make(n, d), make(f, d, scale=s), make(f), make(out, f, scale=1 / math.sqrt(f)), make(out)

        for f in ACTIVATIONS:
            yield Sample(f, (*layer(9, 32, 64), f), {})
        for f in GATED:
            gate = {"weight_gate": make(48, 32, scale=0.2), "bias_gate": make(48)}
            yield Sample(f, (*layer(9, 32, 48), f), gate)
        yield Sample("larger", (*layer(130, 96, 384), "gelu"), {})
        yield Sample("prime sizes", (*layer(13, 37, 71, 29), "gelu_tanh"), {})
        yield Sample("ones", (*layer(1, 1, 1), "silu"), {})
        x, w_in, _, w_out, _ = layer(6, 40, 80)
        yield Sample("no bias", (x.view(2, 3, 40), w_in, None, w_out, None, "relu"), {})
        yield Sample(
            "no bias, gate", (x, w_in, None, w_out, None, "swiglu"), {"weight_gate": make(80, 40, scale=0.2)}
        )
        x, w_in, b_in, w_out, b_out = layer(20, 24, 56)
        transposed = (w_in.t().contiguous().t(), b_in, w_out.t().contiguous().t(), b_out)
        yield Sample("transposed weights", (x, *transposed, "gelu"), {})
        yield Sample("strided x", (make(20, 48)[:, ::2], w_in, b_in, w_out, b_out, "gelu"), {})
        yield Sample("empty", (make(0, 24), w_in, b_in, w_out, b_out, "gelu"), {})
        yield Sample("large", (100 * x, w_in, b_in, w_out, b_out, "gelu"), {})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n, d in ((2048, 384), (2048, 768)):
            w_in, w_out = make(4 * d, d, scale=d**-0.5), make(d, 4 * d, scale=(4 * d) ** -0.5)
            yield Sample(f"{n}x{d}x{4 * d} gelu", (make(n, d), w_in, make(4 * d), w_out, make(d), "gelu"), {})
        n, d, f = 2048, 768, 2048
        w_in, w_gate = make(f, d, scale=d**-0.5), make(f, d, scale=d**-0.5)
        args = (make(n, d), w_in, None, make(d, f, scale=f**-0.5), None, "swiglu")
        yield Sample(f"{n}x{d}x{f} swiglu", args, {"weight_gate": w_gate})

    @staticmethod
    def condition(x, weight_in, *args, **kwargs) -> float:
        """Rounding errors of two sums, of D and of F terms, grow with their square roots."""
        return math.sqrt(weight_in.shape[1]) + math.sqrt(weight_in.shape[0])
