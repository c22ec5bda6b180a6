"""Feed-forward networks: linear, activation, linear, with or without a gate."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ffn_samples, philox
from .activation import ACTIVATIONS, GATED, activate, derivative
from .op import Op, autocast, empty, opmath, register, rows
from .scratch import CHUNK, product
from .sharding import SUM, Split, wanted

OUTPUT_ROWS = 2**62  # dropout of outputs takes its numbers from rows behind those of hidden activations


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
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The feed-forward layer of a transformer: two linears with an activation between them.

    y = a(x) @ weight_outᵀ + bias_out, where u = x @ weight_inᵀ + bias_in and a(x) is f(u), or with
    a gate g = x @ weight_gateᵀ + bias_gate the product f(g) ∘ u.  The kernels go over the rows of x
    in chunks: without a gradient, or with `recompute`, the hidden activations are never whole in
    memory.

    Args:
        x: (*, D); float32, bfloat16, float16 or float64.
        weight_in, bias_in: (F, D) and (F,), any strides (a `.t()` of (D, F) costs nothing).
        weight_out, bias_out: (D_out, F) and (D_out,).
        activation: f: "relu", "gelu" (exact), "gelu_tanh", "silu" or "relu2" (relu squared);
            or, with a gate, "reglu", "geglu" or "swiglu".
        weight_gate, bias_gate: like weight_in and bias_in.
        residual: (*, D_out), added to y; where its dtype is that of y, inside the kernel.
        dropout_p: probability of dropping hidden activations a(x); pass 0 in evaluation.
        output_dropout_p: probability of dropping elements of y, before `residual` is added.
        dropout_seed: int64, one element: the same seed drops the same elements on every backend;
            None draws one from torch's generator.
        recompute: keep nothing but x for backward, which then makes the hidden activations again:
            2 · F elements a row less, or 4 · F with a gate, for one or two of eight products more.

    Returns:
        y, (*, D_out), in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown activation; a probability
            outside [0, 1].
    """
    f = GATED.get(activation, activation)
    tensors = autocast(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out)
    _check(activation, f, *tensors)
    x, *weights = tensors
    shape = (*x.shape[:-1], weights[4].shape[0])
    _check_options(residual, shape, dropout_p, output_dropout_p)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    flat = x.reshape(rows(x, x.shape[-1]), x.shape[-1]).contiguous()
    fused = residual is not None and residual.dtype == x.dtype
    added = residual.reshape(flat.shape[0], shape[-1]).contiguous() if fused else None
    seed = philox.new_seed(x, dropout_seed) if dropout_p or output_dropout_p else None
    options = f, float(dropout_p), float(output_dropout_p), keep and not recompute
    y = FFN.apply(flat, *weights, added, seed, *options).view(shape)
    return y if residual is None or fused else residual + y


def _check_options(residual: Tensor | None, shape: tuple, dropout_p: float, output_dropout_p: float) -> None:
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"ffn: residual has shape {tuple(residual.shape)}, expected {shape}")
    for name, p in (("dropout_p", dropout_p), ("output_dropout_p", output_dropout_p)):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"ffn: {name} is {p}, expected a probability in [0, 1]")


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


def _factors(like: Tensor, seed: Tensor | None, p: float, first_row: int = 0) -> Tensor | float:
    """What dropout multiplies the elements of `like`, (N, C), by."""
    if seed is None or p == 0:
        return 1.0
    i = torch.arange(like.shape[0], device=like.device)[:, None] + first_row
    j = torch.arange(like.shape[1], device=like.device)
    return philox.factors(seed, i, j, p, opmath(like.dtype))


@register
class FFN(Op):
    """y = residual + drop(h W_outᵀ + b_out),  h = drop(f(u) or f(g) ∘ u),
    u = x W_inᵀ + b_in,  g = x W_gateᵀ + b_gate

    Bias, activation, dropout and residual run in the epilogues of the two products, their derivatives in
    those of backward's.  Backward keeps u (and g) and makes h again from them, so one
    hidden activation less is stored than by separate modules.
    """

    name = "ffn"
    family = "ffn"
    batched = ("x",)
    lowers = True
    source = (
        "Vaswani et al. 2017, arXiv:1706.03762, eq. 2; "
        "gated: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, eq. 5 and 6"
    )
    gradients = {
        "x": 0, "weight_in": 1, "bias_in": 2, "weight_gate": 3, "bias_gate": 4, "weight_out": 5,
        "bias_out": 6,
    }  # fmt: skip
    passes = {"residual": 0}
    constant = ("dropout_seed",)
    public = staticmethod(ffn)
    samples = staticmethod(ffn_samples.samples)
    benchmarks = staticmethod(ffn_samples.benchmarks)
    variants = staticmethod(ffn_samples.variants)
    draw = staticmethod(ffn_samples.draw)

    @staticmethod
    def reference(
        x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
        bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, residual: Tensor | None,
        seed: Tensor | None, activation: str, dropout_p: float, output_dropout_p: float, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        f = opmath(x.dtype)
        u = F.linear(x, weight_in, bias_in)  # (N, F)
        g = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
        h = activate(u.to(f), activation) if g is None else activate(g.to(f), activation) * u.to(f)
        h = h * _factors(h, seed, dropout_p)
        y = F.linear(h.to(x.dtype), weight_out, bias_out)  # (N, D_out)
        if seed is not None or residual is not None:
            y = y.to(f) * _factors(y, seed, output_dropout_p, OUTPUT_ROWS)
            y = (y if residual is None else y + residual).to(x.dtype)
        return y, u if keep else empty(x), g if keep and g is not None else empty(x)

    @staticmethod
    def outputs(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, *options):
        wide = x.new_empty(x.shape[0], weight_in.shape[0]) if options[-1] else empty(x)
        gate = torch.empty_like(wide) if weight_gate is not None else empty(x)
        return x.new_empty(x.shape[0], weight_out.shape[0]), wide, gate

    @staticmethod
    def save(args, outs):
        *inputs, _, seed, activation, dropout_p, output_dropout_p, _ = args
        return *inputs, seed, outs[1], outs[2], activation, dropout_p, output_dropout_p

    @staticmethod
    def replay(*saved):
        *inputs, seed, _, _, activation, dropout_p, output_dropout_p = saved
        return *inputs, None, seed, activation, dropout_p, output_dropout_p, True

    @staticmethod
    def reference_bwd(
        dy: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_gate: Tensor | None,
        bias_gate: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, seed: Tensor | None,
        u: Tensor, g: Tensor, activation: str, dropout_p: float, output_dropout_p: float, needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        f = opmath(x.dtype)
        if u.numel() == 0:
            u = F.linear(x, weight_in, bias_in)
            g = empty(x) if weight_gate is None else F.linear(x, weight_gate, bias_gate)
        factors = _factors(u, seed, dropout_p)
        if seed is not None and output_dropout_p:
            dy = (dy.to(f) * _factors(dy, seed, output_dropout_p, OUTPUT_ROWS)).to(dy.dtype)
        dh = (dy @ weight_out).to(f) * factors  # (N, F)
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
            dy.t() @ (h * factors).to(x.dtype),
            dy.to(f).sum(0).to(x.dtype),
        )
        return tuple(d.contiguous() if need and d is not None else empty(x) for d, need in zip(grads, needs))

    @staticmethod
    def outputs_bwd(dy, x, *saved):
        like, needs = (x, *saved[:6]), saved[-1]
        return tuple(
            x.new_empty(t.shape) if need and t is not None else empty(x) for t, need in zip(like, needs)
        )

    @staticmethod
    def splits(half, args):
        """By rows, or by hidden units; dropout counts in whole tensors, so with it every device has all."""
        if args["seed"] is not None:
            return
        gated = args["weight_gate"] is not None
        hidden = dict.fromkeys(("weight_in", "bias_in", "weight_gate", "bias_gate"), 0) | {"weight_out": 1}
        if half == "fwd":
            keep = args["keep"]
            yield Split({"x": 0, "residual": 0}, (0, wanted(keep, 0), wanted(keep and gated, 0)))
            if args["bias_out"] is None and args["residual"] is None:
                yield Split(hidden, (SUM, wanted(keep, 1), wanted(keep and gated, 1)))
            return
        kept = args["u"].shape[0] > 0 and len(args["u"].shape) == 2
        states = ("u", "g") if gated else ("u",)
        for split, where, at in (
            ({"dy": 0, "x": 0}, (0, SUM, SUM, SUM, SUM, SUM, SUM), 0),
            (hidden, (SUM, 0, 0, 0, 0, 1, None), 1),
        ):
            inputs = {**split, **(dict.fromkeys(states, at) if kept else {})}
            yield Split(inputs, tuple(wanted(n, w) for n, w in zip(args["needs"], where)))

    @staticmethod
    def flops(x, weight_in, bias_in, weight_gate, bias_gate, weight_out, *options):
        products = weight_in.numel() * (1 if weight_gate is None else 2) + weight_out.numel()
        return 2 * x.shape[0] * products

    @staticmethod
    def flops_bwd(dy, x, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out, seed, u, *options):
        needs = options[-1]
        gate = 0 if weight_gate is None else weight_gate.numel()
        inputs = weight_out.numel() + needs[0] * (weight_in.numel() + gate)
        weights = needs[1] * weight_in.numel() + needs[3] * gate + needs[5] * weight_out.numel()
        again = 0 if u.numel() else weight_in.numel() + gate
        return 2 * x.shape[0] * (inputs + weights + again)

    @staticmethod
    def scratch(half, args):
        x, (wide, dim), out = args["x"], args["weight_in"].shape, args["weight_out"].shape[0]
        rows, gated = min(CHUNK, x.shape[0]), args["weight_gate"] is not None
        hidden = rows * wide * x.element_size()
        if half == "fwd":
            return hidden + max(product(rows, wide, dim), product(rows, out, wide))
        again = 0 if args["u"].numel() else 1 + gated
        dropped = rows * out * x.element_size() if args["output_dropout_p"] else 0
        to_x, to_in, _, _, _, to_out, _ = args["needs"]
        products = (
            product(rows, wide, out),
            to_x * product(rows, dim, wide),
            to_in * product(wide, dim, rows),
            to_out * product(out, wide, rows),
        )
        return (2 + gated + again) * hidden + dropped + max(products)

    @staticmethod
    def eager(
        x,
        weight_in,
        bias_in,
        weight_out,
        bias_out,
        activation="gelu",
        *,
        weight_gate=None,
        bias_gate=None,
        residual=None,
        dropout_p=0.0,
        output_dropout_p=0.0,
        dropout_seed=None,
        recompute=False,
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
        if dropout_p:
            kept = _factors(h.flatten(0, -2), dropout_seed, dropout_p)
            h = (h * kept.view(h.shape)).to(x.dtype)
        y = F.linear(h, weight_out, bias_out)
        if output_dropout_p:
            kept = _factors(y.flatten(0, -2), dropout_seed, output_dropout_p, OUTPUT_ROWS)
            y = (y * kept.view(y.shape)).to(x.dtype)
        return y if residual is None else residual + y

    @staticmethod
    def condition(x, weight_in, *args, **kwargs) -> float:
        """Rounding errors of two sums, of D and of F terms, grow with their square roots."""
        return math.sqrt(weight_in.shape[1]) + math.sqrt(weight_in.shape[0])
