"""Tensors in and out of safetensors files, modules and optimizers.

The file format (https://huggingface.co/docs/safetensors) is written here, tensor by tensor, because the
library would want all of it in memory, or the file to itself; it is read by the library.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..durable import Damaged
from ..errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_pieces(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, in pieces; one tensor at a time comes to the CPU."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, t in tensors.items():
        end = start + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for t in tensors.values():
        if t.numel():
            flat = t.detach().cpu().contiguous().view(-1)
            yield memoryview(flat.view(torch.uint8).numpy())


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU.

    Raises:
        Damaged: it is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path.name} is no safetensors file ({error})") from None


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones the first name alone."""
    seen, result = set(), {}
    for name, t in module.state_dict().items():
        place = (t.data_ptr(), t.shape, t.stride()) if t.numel() else name
        if place not in seen:
            seen.add(place)
            result[name] = t
    return result


@torch.no_grad()
def fill_module(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors`, as `module_tensors` gave them, into a module; `source` is what an error calls them.

    Raises:
        UserError: other names or shapes; then nothing was copied.
    """
    targets = module_tensors(module)
    if missing := [name for name in targets if name not in tensors]:
        raise UserError(
            f"{source} is of another model: it has no {missing[0]}; build the model it was made of"
        )
    if strange := [name for name in tensors if name not in targets]:
        raise UserError(f"{source} is of another model: {strange[0]} is not in this one")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise UserError(
                f"{source} is of another model: {name} has shape {tuple(tensors[name].shape)}, expected "
                f"{tuple(target.shape)}; build the model with the sizes that the checkpoint has"
            )
    for name, target in targets.items():
        target.copy_(tensors[name])


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[dict]]:
    """The state as "parameter/field" -> tensor, and the groups as plain values with names of parameters."""
    names = {p: name for name, p in parameters.items()}
    tensors = {
        f"{names[p]}/{field}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for field, value in optimizer.state.get(p, {}).items()
    }
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return tensors, groups


def fill_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    groups: list[dict],
) -> None:
    """Give an optimizer over these parameters the state that `optimizer_state` took.

    Raises:
        UserError: the groups hold other parameters.
    """
    _, now = optimizer_state(optimizer, parameters)
    if [group["params"] for group in now] != [group["params"] for group in groups]:
        raise UserError(
            "the checkpoint's optimizer has other parameters; resume with the model it was made of"
        )
    order = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        state.setdefault(order[name], {})[field] = value
    numbered = [
        {field: tuple(value) if isinstance(value, list) else value for field, value in group.items()}  # JSON
        | {"params": [order[name] for name in group["params"]]}
        for group in groups
    ]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})
