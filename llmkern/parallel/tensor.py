"""Tensor parallelism: matrices divided by outputs, then by inputs, with one exchange before and one behind.

Parameters become DTensors; while a layer runs, its modules see this process's parts as plain tensors, so that
attention runs on its heads and the feed-forward on its columns, fused as ever.  Between them the sequence is
divided.  A layer exchanges four times, forward and backward, as much as one all-reduce each: its input is
gathered once for query, key and value together, packed or not.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3; Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..nn.children import hooked
from ..nn.linear import Linear
from .exchange import gather, scatter
from .overlap import Columns, in_halves
from .spine import Spine

BY_OUTPUTS = ("c_attn", "c_fc", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("c_proj", "o_proj", "down_proj")
PACKED = "c_attn"  # all of query, then of key, then of value; in the order of heads it can be divided


class View(NamedTuple):
    """How a module sees one of its parameters while it runs."""

    module: nn.Module
    name: str
    see: Callable[[DTensor], Tensor]


def by_heads(rows: Tensor, heads: int) -> Tensor:
    """(3 H D, ...) of queries, keys and values to the order of heads, each with its query, key and value."""
    return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def by_kinds(rows: Tensor, heads: int) -> Tensor:
    """Back from the order of `by_heads`."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def part_of(t: Tensor, p: Tensor, heads: int | None = None) -> Tensor:
    """This process's part of a whole tensor, divided as `p` is; rows come in the order of `heads` first."""
    t = (by_heads(t, heads) if heads else t).to(p.device)
    if not isinstance(p, DTensor):
        return t
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def divide(model: nn.Module, spine: Spine, mesh: DeviceMesh) -> list[View]:
    """Divide the parameters of a decoder in place, and have its layers run on this process's parts.

    Returns:
        Views of the parameters outside of layers, for who runs those.
    """
    done: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for layer in spine.parts[spine.layers]:
        attention = getattr(layer, spine.attention)
        layer.forward = seen(layer.forward, _divide_modules(layer, mesh, done, attention.n_head))
        if hasattr(attention, PACKED):
            attention.n_head //= mesh.size()
            attention.n_kv_head //= mesh.size()
        _exchange_around_attention(attention, mesh)
        _exchange_around_ffn(layer.mlp, mesh)
    return _divide_modules(model, mesh, done)


def packed(model: nn.Module) -> dict[str, int]:
    """Name -> heads of the parameters that `divide` puts in the order of heads."""
    names = [name for name, _ in model.named_parameters() if PACKED in name.split(".")]
    return {name: model.config.n_head for name in names}


def _divide_modules(
    root: nn.Module, mesh: DeviceMesh, done: dict[nn.Parameter, nn.Parameter], heads: int = 0
) -> list[View]:
    """Divide what is not yet divided; `done` holds what a parameter became."""
    views = []
    for path, module in root.named_modules():
        kind = path.rpartition(".")[2]
        for name, p in list(module._parameters.items()):
            if p is None or (isinstance(p, DTensor) and p not in done):  # of a layer that is divided already
                continue
            placement, see = _rule(module, kind, name, mesh)
            data = p.detach()
            if kind == PACKED:
                data, see = by_heads(data, heads), partial(_see_packed, heads // mesh.size())
            if p not in done:
                part = distribute_tensor(data.contiguous(), mesh, [placement], src_data_rank=None)
                done[p] = nn.Parameter(part.clone(), requires_grad=p.requires_grad)
            module.register_parameter(name, done[p])
            views.append(View(module, name, see))
    return views


def _rule(
    module: nn.Module, kind: str, name: str, mesh: DeviceMesh
) -> tuple[Any, Callable[[DTensor], Tensor]]:
    """How a parameter is divided, and seen."""
    if kind in BY_OUTPUTS or kind == "lm_head" or (isinstance(module, nn.Embedding) and kind != "wpe"):
        return Shard(0), DTensor.to_local
    if kind in BY_INPUTS:
        if name == "weight":
            return Shard(1), DTensor.to_local
        return Replicate(), partial(_see_once, mesh.get_local_rank() == 0)  # is added to a term of a sum
    return Replicate(), DTensor.to_local


def _see_once(first: bool, p: DTensor) -> Tensor:
    return p.to_local() * first


def _see_packed(heads: int, p: DTensor) -> Tensor:
    return by_kinds(p.to_local(), heads)


def seen(forward: Callable, views: list[View]) -> Callable:
    """`forward`, during which the views take the places of the parameters."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kept = [module._parameters[name] for module, name, _ in views]
        try:
            for (module, name, see), p in zip(views, kept):
                module._parameters[name] = see(p)
            return forward(*args, **kwargs)
        finally:
            for (module, name, _), p in zip(views, kept):
                module._parameters[name] = p

    return run


def _exchange_around_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    """Gather its input, sum and divide what it gives; then drop of that."""
    p = _without_dropout(attention, "resid_dropout")
    linears = [child for name, child in attention.named_children() if name in BY_OUTPUTS]
    ahead = Columns(linears, mesh).gather if all(map(_plain, linears)) else partial(gather, mesh=mesh)
    attention.register_forward_pre_hook(lambda module, args: (ahead(args[0]), *args[1:]))
    attention.register_forward_hook(lambda module, args, y: F.dropout(scatter(y, mesh), p, module.training))


def _plain(linear: nn.Module) -> bool:
    """Whether it does what its weight and bias say, and no more."""
    return type(linear) in (nn.Linear, Linear) and not hooked(linear)


def _exchange_around_ffn(ffn: nn.Module, mesh: DeviceMesh) -> None:
    """The same, in two halves."""
    p = _without_dropout(ffn, "dropout")
    run = partial(in_halves, ffn.forward, mesh)
    ffn.forward = lambda x: F.dropout(run(x), p, ffn.training)


def _without_dropout(part: nn.Module, name: str) -> float:
    """The probability of a dropout, which is turned off."""
    dropout, p = getattr(part, name, None), 0.0
    if dropout is not None:
        p, dropout.p = dropout.p, 0.0
    return p


@torch.no_grad()
def sum_replicated(model: nn.Module, mesh: DeviceMesh) -> None:
    """Add up the gradients of parameters that all have whole, each of its own tokens; in one exchange."""
    dim = mesh.mesh_dim_names[0]
    grads = [p.grad for p in model.parameters() if p.grad is not None and _is_whole(p, dim)]
    parts = [g.to_local() for g in grads]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=mesh.get_group())
    for part, value in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(value.view_as(part))


def _is_whole(p: DTensor, dim: str) -> bool:
    return p.placements[p.device_mesh.mesh_dim_names.index(dim)].is_replicate()
