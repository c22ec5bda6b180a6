"""A divided model's weights and optimizer as whole tensors, and back: a checkpoint knows no mesh.

Every process takes part; the tensors come together on the first, one at a time.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .tensor import by_heads, by_kinds


def whole(t: Tensor) -> Tensor:
    """All of a tensor, on the CPU."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


def part_like(t: Tensor, p: Tensor) -> Tensor:
    """This process's part of the whole tensor `t`, divided as `p` is."""
    if not isinstance(p, DTensor):
        return t.to(p.device)
    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """As `llmkern.train.tensors.optimizer_state`, with parts."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {
        f"{names[p]}/{field}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for field, value in optimizer.state.get(p, {}).items()
    }
    return tensors, [
        {**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]


def gather(tensors: dict[str, Tensor], packed: dict[str, int]) -> dict[str, Tensor]:
    """The whole tensors on the first process; others give their parts and get nothing."""
    first, result = dist.get_rank() == 0, {}
    for name, t in tensors.items():
        value = whole(t)
        if first:
            result[name] = by_kinds(value, heads) if (heads := packed.get(name.split("/")[0])) else value
    return result


def fill(model: nn.Module, tensors: dict[str, Tensor], packed: dict[str, int]) -> dict[str, Tensor]:
    """Parts of the whole "parameter/field" tensors of an optimizer; fields of one element stay whole."""
    parameters = dict(model.named_parameters())
    result = {}
    for key, t in tensors.items():
        name = key.rsplit("/", 1)[0]
        p = parameters[name]
        t = by_heads(t, packed[name]) if name in packed and t.shape == p.shape else t
        result[key] = part_like(t, p) if t.shape == p.shape else t
    return result
