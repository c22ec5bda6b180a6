"""Work of one call of any op: FLOPs, and bytes that must cross the memory bus once.

llmkern's ops tell their own, from the op table; products, convolutions and attention of torch have the
formulas of `torch.utils.flop_counter`, except where that knows none (attention on a CPU) or counts what a
causal kernel skips.  Everything else is arithmetic for each element.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..ops.op import OPS, Op

PRODUCTS = {"attention", "decode_attention", "ffn", "linear", "quant_linear", "linear_cross_entropy"}
COLLECTIVES = {"c10d", "_c10d_functional", "c10d_functional"}
ROWS = {"embedding", "index_select", "gather", "index"}  # read of their table only what they return
OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_"}  # write without reading
NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream"}
PER_ELEMENT = {  # FLOPs for each element of the largest tensor, as the op table counts its own
    "native_layer_norm": 8, "native_layer_norm_backward": 12,
    "_fused_rms_norm": 4, "_fused_rms_norm_backward": 9,
    "_softmax": 4, "_softmax_backward_data": 4, "_log_softmax": 4, "_log_softmax_backward_data": 4,
    "gelu": 10, "gelu_backward": 14, "native_dropout": 2,
    "_fused_adamw_": 14, "_fused_adam_": 14, "nll_loss_forward": 0, "nll_loss_backward": 0,
}  # fmt: skip


class Work(NamedTuple):
    """What one call has to do.

    Attributes:
        flops: floating-point operations that are executed.
        bytes: of inputs and outputs, each once.
        model_flops: those that the model needs by the convention of MFU: products alone, attention over
            all pairs of positions, nothing computed twice (Chowdhery et al. 2022, arXiv:2204.02311, app. B).
    """

    flops: float
    bytes: float
    model_flops: float


def work(func: OpOverload, args: tuple, kwargs: dict, out: Any) -> Work:
    """The work of `func(*args, **kwargs)`, which returned `out`."""
    moved = _bytes(func, args, kwargs, out)
    namespace, name = _split(func)
    if namespace == "llmkern":
        return _of_table(name, args, moved)
    if "scaled_dot_product" in name or name.startswith(("_flash_attention", "_efficient_attention")):
        return _attention(name, named_arguments(func, args, kwargs), moved)
    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        flops = float(formula(*args, **kwargs, out_val=out))
        return Work(flops, moved, flops)
    if name in NO_WORK or namespace in COLLECTIVES:
        return Work(0.0, moved, 0.0)
    largest = max((t.numel() for t in _tensors((args, kwargs, out))), default=0)
    if name in ("_fused_adamw_", "_fused_adam_"):
        largest = sum(t.numel() for t in args[0])
    return Work(PER_ELEMENT.get(name, _default(func)) * largest, moved, 0.0)


def scratch(func: OpOverload, args: tuple, kwargs: dict) -> int:
    """Bytes that llmkern's C++ kernel of `func` takes beside its outputs, and keeps; 0 of other ops."""
    namespace, name = _split(func)
    if namespace != "llmkern":
        return 0
    op, half = table_op(name)
    return op.scratch(half, named_arguments(func, args, kwargs))


def named_arguments(func: OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by the names of the op's schema, defaults included."""
    values = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in func._schema.arguments), args))
    return {**values, **kwargs}


def table_op(name: str) -> tuple[Op, str]:
    """The record of the op table and the half that llmkern::`name` is."""
    op, _, half = name.rpartition("_")
    return OPS[op], half


def is_collective(func: OpOverload) -> bool:
    """Whether it moves data between devices."""
    return _split(func)[0] in COLLECTIVES


def is_product(name: str) -> bool:
    """Whether the op of this name, as "aten.addmm" or "llmkern.ffn_fwd", is bound by products."""
    namespace, _, base = name.partition(".")
    if namespace == "llmkern":
        return base.rpartition("_")[0] in PRODUCTS
    return base in {str(packet).partition(".")[2] for packet in flop_registry} or "attention" in base


def _of_table(name: str, args: tuple, moved: float) -> Work:
    op, half = table_op(name)
    if half == "fwd":
        moved -= op.unread(*args)
    flops = float((op.flops if half == "fwd" else op.flops_bwd)(*args))
    return Work(flops, moved, _model_flops(op, half, args, flops) if op.name in PRODUCTS else 0.0)


def _model_flops(op: Op, half: str, args: tuple, flops: float) -> float:
    """`flops` without recomputation, and with every pair of positions in attention."""
    if op.name == "attention":
        q, k, v = args[:3] if half == "fwd" else args[2:5]
        return _pairs(q, k, v, 2.0 if half == "bwd" else 1.0)
    if half == "bwd" and op.name == "linear_cross_entropy":
        _, x, head = args[:3]
        return max(0.0, flops - 2 * x.shape[0] * head.numel())  # 0: forward made the gradients
    if half == "bwd" and op.name == "ffn":
        stored = args[list(a.name for a in op.bwd._schema.arguments).index("u")]
        _, x, weight_in, _, weight_gate = args[:5]
        again = weight_in.numel() + (0 if weight_gate is None else weight_gate.numel())
        return flops if stored.numel() else flops - 2 * x.shape[0] * again
    return flops


def _attention(name: str, named: dict[str, Any], moved: float) -> Work:
    """Five products in backward for forward's two, over the pairs that a causal mask lets through."""
    q, k, v = (named[key] for key in ("query", "key", "value"))
    backward = "backward" in name
    full = _pairs(q, k, v)
    visible = _visible(q.shape[-2], k.shape[-2]) if named.get("is_causal") else 1.0
    return Work(full * visible * (2.5 if backward else 1.0), moved, full * (2.0 if backward else 1.0))


def _pairs(q: Tensor, k: Tensor, v: Tensor, factor: float = 1.0) -> float:
    """2 FLOPs for each element of a key and of a value, for every (query, key) pair."""
    heads = q[..., 0, 0].numel()
    return 2.0 * heads * q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1]) * factor


def _visible(queries: int, keys: int) -> float:
    """The part of all pairs that a causal mask, aligned at the top left, lets through."""
    seen = sum(min(i + 1, keys) for i in range(queries)) if queries < 64 else None
    if seen is None:
        short = min(queries, keys)
        seen = short * (short + 1) / 2 + max(0, queries - keys) * keys
    return seen / (queries * keys)


def _bytes(func: OpOverload, args: tuple, kwargs: dict, out: Any) -> float:
    """Inputs that are read, arguments that are written, and outputs that are new."""
    _, name = _split(func)
    if name in NO_WORK:
        return 0.0
    read = {_place(t): _size(t) for t in _tensors((args, kwargs))}
    made = {_place(t): _size(t) for t in _tensors(out) if _place(t) not in read}
    written = sum(_size(t) for t in _written(func, args, kwargs))
    if name.startswith("_fused_adam") and kwargs.get("grad_scale") is None:
        written -= sum(_size(t) for t in args[1])  # gradients, which are written only where they are scaled
    if name in OVERWRITES:
        read = {_place(t): _size(t) for t in _tensors((args[1:], kwargs))}
    elif name in ROWS:
        table, *rest = (_size(t) for t in _tensors((args, kwargs)))
        return min(table, sum(made.values())) + sum(rest) + sum(made.values())
    return float(sum(read.values()) + written + sum(made.values()))


def _written(func: OpOverload, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for name in written_arguments(func):
        yield from _tensors(named_arguments(func, args, kwargs).get(name))


@cache
def written_arguments(func: OpOverload) -> list[str]:
    """Names of the arguments that it writes to."""
    arguments = func._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _place(t: Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape


def _size(t: Tensor) -> int:
    """Bytes of the elements, those of an expanded tensor once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride else min(size, 1)
    return elements * t.element_size()


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout == torch.strided]


@cache
def _split(func: OpOverload) -> tuple[str, str]:
    namespace, _, name = func._schema.name.partition("::")
    return namespace, name


@cache
def _default(func: OpOverload) -> int:
    """One operation for each element of what computes element by element or sums; none for copies."""
    pointwise = torch.Tag.pointwise in func.tags or torch.Tag.reduction in func.tags
    return 1 if pointwise or _split(func)[1].startswith("_foreach") else 0
