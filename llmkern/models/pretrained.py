"""Hugging Face checkpoints in and out: a folder with config.json and safetensors, without transformers."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import gpt2_format, llama_format
from .meta import on_meta
from .pretrained_format import Format
from .weights import SHARD_BYTES, count_weights, read_json, read_weights, write_weights

CONFIG = "config.json"
FORMATS = (gpt2_format.FORMAT, llama_format.FORMAT)


def from_pretrained(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, **changes: object
) -> nn.Module:
    """The model that Hugging Face transformers, or `save_pretrained`, saved into a folder.

        model = llmkern.models.from_pretrained("gpt2/")

    Args:
        folder: with config.json, and model.safetensors or files with model.safetensors.index.json.
        dtype: of the parameters; None is that of the file, or float32 if the file has several.
        changes: fields of our configuration to change, as dropout=0.0.

    Returns:
        A `GPT`, or another of our models, in `eval` mode, on the CPU.

    Raises:
        UserError: what is missing, broken, or not known to our models.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{str(folder)!r} has no {CONFIG}; expected a folder that transformers or llmkern saved"
        )
    fields = read_json(folder / CONFIG)
    format = _find(fields)
    config = format.read_config(fields)
    layers = getattr(config, format.layers)
    if layers > (weights := count_weights(folder)):
        raise UserError(f"{CONFIG} describes {layers} layers, but {str(folder)!r} has {weights} weights")
    model = on_meta(format.model, replace(config, **changes), CONFIG)
    _fill(model, format, folder, dtype)
    return model.eval()


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model so that `from_pretrained`, and Hugging Face transformers, can read it.

    A GPT without biases is written with biases of 0, which transformers' GPT-2 must have.

    Args:
        model: a `GPT`, or another of our models; not quantised.
        folder: made if it is not there.
        dtype: of the weights in the file; None is that of the model.
        shard_bytes: the most that a file may have.

    Returns:
        The folder.

    Raises:
        ValueError: a model that transformers has not.
        UserError: the folder cannot be written to.
    """
    format = next((f for f in FORMATS if isinstance(model, f.model)), None)
    if format is None:
        names = ", ".join(f.model.__name__ for f in FORMATS)
        raise ValueError(f"save_pretrained: model is a {type(model).__name__}, expected one of {names}")
    fields = format.write_config(model.config)
    tensors = format.write_tensors(model)
    if strange := [name for name in tensors if name.endswith((".qweight", ".lora_A"))]:
        raise ValueError(
            f"save_pretrained: the model has {strange[0]}, expected plain linears; save it before it is "
            "quantised, and merge LoRA first"
        )
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    fields["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, tensors, shard_bytes)
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written to ({error.strerror}); choose another") from None
    return folder


def _find(fields: dict[str, Any]) -> Format:
    kind = fields.get("model_type")
    for format in FORMATS:
        if kind in format.model_types:
            return format
    known = ", ".join(name for format in FORMATS for name in format.model_types)
    raise UserError(f"{CONFIG}: model_type is {kind!r}, expected one of {known}")


def _fill(model: nn.Module, format: Format, folder: Path, dtype: torch.dtype | None) -> None:
    """Give the parameters of a model on meta their values; tied ones stay tied."""
    expected = dict(model.named_parameters())  # of tied ones the first name alone
    tied = set(model.state_dict()) - set(expected)
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in read_weights(folder):
        read = format.read_tensor(theirs, tensor)
        if read is None:
            continue
        name, tensor = read
        if name in tied:  # some files have it twice
            continue
        if name not in expected:
            raise UserError(f"{str(folder)!r} has the weight {theirs}, for which {CONFIG} has no place")
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{str(folder)!r}: {theirs} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)} by {CONFIG}"
            )
        tensors[name] = tensor
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(f"{str(folder)!r} has no {missing[0]}, which {CONFIG} asks for")
    stored = {t.dtype for t in tensors.values()}
    dtype = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
    filled = {
        id(p): nn.Parameter(tensors[name].to(dtype).contiguous(), p.requires_grad)
        for name, p in expected.items()
    }
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = filled[id(p)]
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            module.to_empty(device="cpu", recurse=False)  # tables of positions make themselves anew
