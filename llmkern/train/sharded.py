"""The files of a checkpoint that many processes write, each its own parts, and that any number of them read.

    shard-00001-model-00001-of-00001.safetensors, ...     "parameter" and "parameter/field", and their places

What replica R has for itself, where replicas train apart, is "parameter/field.R".

By torch.distributed.checkpoint in the safetensors format of its Hugging Face storage: no pickle, and a folder
of whole tensors reads the same.  Of an optimizer each process reads no more than its parts.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import durable

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    from ..parallel import Parallel

FILES = "shard-*.safetensors"


def write(folder: Path, tensors: dict[str, Tensor], rank: int) -> dict[str, dict[str, int | str]]:
    """Write this process's parts, together with all others; returns size and checksum of its files."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)  # syncs what it writes
    dcp.save(tensors, storage_writer=writer)
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}
        for path in folder.glob(FILES.replace("*", f"{rank + 1:05d}-*"))
    }


def read(folder: Path, wanted: Callable[[str], bool], packed: dict[str, int]) -> dict[str, Tensor]:
    """The whole tensors of these names, on the CPU, in the order of rows of an undivided model.

    Args:
        packed: as `Parallel.packed`, of the run that wrote them.
    """
    tensors = {key: t for key, t in _wholes(folder).items() if wanted(key)}
    _load(folder, tensors)
    return {key: _unpacked(key, t, packed) for key, t in tensors.items()}


def read_parts(
    folder: Path, parallel: "Parallel", packed: dict[str, int], replicas: int
) -> dict[str, Tensor]:
    """This process's parts of an optimizer's "parameter/field" tensors; fields of one element are whole.

    Args:
        packed, replicas: as the checkpoint has them; of replicas that train apart each reads its own, and
            where there are more now than were saved, several begin with the same.
    """
    from ..parallel.tensor import part_of

    parameters, tensors, reordered = parallel.parameters(), {}, []
    mine = str(parallel.replica % replicas) if replicas else ""
    for key, whole in _wholes(folder).items():
        name, _, field = key.rpartition("/")
        replica = field.partition(".")[2]
        if not field or name not in parameters or replica not in ("", mine):
            continue
        p = parameters[name]
        tensors[key] = whole
        if whole.shape == p.shape:
            if packed.get(name) == parallel.packed.get(name):
                tensors[key] = torch.empty_like(p, dtype=whole.dtype).detach()
            else:
                reordered.append(key)
    _load(folder, tensors)
    for key in reordered:
        name = key.rpartition("/")[0]
        whole = _unpacked(key, tensors[key], packed)
        tensors[key] = part_of(whole, parameters[name], parallel.packed.get(name))
    return {key.removesuffix(f".{mine}") if mine else key: t for key, t in tensors.items()}


def _wholes(folder: Path) -> dict[str, Tensor]:
    """Tensors for all of a checkpoint, whose memory is not touched before it is read into."""
    about = _reader(folder).read_metadata().state_dict_metadata
    return {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in about.items()}


def _unpacked(key: str, t: Tensor, packed: dict[str, int]) -> Tensor:
    from ..parallel.tensor import by_kinds

    heads = packed.get(key.split("/")[0])
    return by_kinds(t, heads) if heads and t.dim() else t


def _reader(folder: Path) -> "HuggingFaceStorageReader":
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def _load(folder: Path, tensors: dict[str, Any]) -> None:
    """Fill the tensors; each process by itself."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*load in a single process")  # which is the intent
        dcp.load(tensors, storage_reader=_reader(folder), no_dist=True)
