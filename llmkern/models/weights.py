"""Weights in a folder, as Hugging Face keeps them: model.safetensors, or several files with an index.

The files are read and written by the library `safetensors`, which holds every header against the size of
its file before anything is allocated.  No pickle is ever opened.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r} cannot be read ({reason}); expected a file of JSON") from None
    if not isinstance(fields, dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(fields).__name__}, expected an object")
    return fields


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight in a folder, one after another, on the CPU.

    Raises:
        UserError: no weights, a file that is missing or broken, or an index that does not fit its files.
    """
    for path, names in _files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                there = set(file.keys())
                for name in sorted(there if names is None else names):
                    if name not in there:
                        raise UserError(
                            f"{str(path)!r} has no {name}, which {INDEX} promises; copy both again"
                        )
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from None


def count_weights(folder: Path) -> int:
    """How many weights the files of a folder have, by their headers.

    Raises:
        UserError: as `read_weights`.
    """
    count = 0
    for path, names in _files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                count += len(file.keys() if names is None else names)
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from None
    return count


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{str(path)!r} is no whole safetensors file ({error}); copy it again")


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Each file and the names to read from it; None is all."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        also = f"; {pickles[0]} is a pickle, which is not opened: save it as safetensors" if pickles else ""
        raise UserError(f"{str(folder)!r} has neither {SINGLE} nor {INDEX}{also}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{str(folder / INDEX)!r} has no weight_map from names to files; copy it again")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{str(folder / INDEX)!r} names the file {file!r}, which is not in that folder")
        files.setdefault(folder / file, []).append(name)
    return files


def write_weights(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors`, which share no memory, into one file, or into several of at most `shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    for file, shard in zip(names, shards):
        part = folder / f".{file}.part"  # a file of that name is whole
        save_file({name: t.detach().cpu().contiguous() for name, t in shard.items()}, part, {"format": "pt"})
        os.replace(part, folder / file)
    if count > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    for stale in folder.glob("model*.safetensors*"):  # of another number of files
        if stale.name not in names and not (count > 1 and stale.name == INDEX):
            stale.unlink()
