"""From MODEL on the command line to a model and a batch."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..load import open_model
from ..models import GPT, Llama
from ..models.presets import LLAMA_PRESETS, PRESETS
from .decode import DecodeStep

ONE_CALL = (
    "on a CPU generate() makes such a step in one C++ call, without the launches; here its ops run one by one"
)


@dataclass
class Subject:
    """What is diagnosed: the arguments of `diagnose`."""

    model: nn.Module
    batch: Any
    loss_fn: Callable | None = None
    kv_cache: tuple[Tensor, ...] = ()
    notes: tuple[str, ...] = ()


def load(name: str, batch: int, length: int | None, mode: str, device: str) -> Subject:
    """The model called `name`, and random tokens for it.

    Args:
        name: a preset; the folder of a run, a Hugging Face folder or a .gguf file; "module:function" or
            "file.py:function", which returns a model, (model, batch) or (model, batch, loss_fn).
        batch: sequences in the batch.
        length: tokens of each; None is 1024 or what the model takes, if that is less.
        mode: "train", "inference", or "decode".
        device: where to put it.

    Raises:
        UserError: what is wrong with `name`, or with the model for this mode.
    """
    if ":" in name:
        subject = _from_function(name, batch, length, device)
        if mode == "decode":
            raise UserError(
                f"--mode is decode, but {name} is not a preset or a checkpoint of a GPT; use inference"
            )
        return subject
    model = _named(name, kernels=mode == "decode").to(device)
    vocabulary, longest = model.config.vocab_size, model.config.block_size
    tokens = min(1024, longest) if length is None else length
    if tokens + (mode == "decode") > longest:
        raise UserError(
            f"--length is {tokens}, but {name} takes at most {longest - (mode == 'decode')} tokens"
        )
    if mode == "decode":
        step = DecodeStep(model, batch, tokens)
        token = torch.randint(vocabulary, (batch, 1), device=device)
        return Subject(step, token, kv_cache=step.kv_cache(), notes=(ONE_CALL,) * (device == "cpu"))
    ids = torch.randint(vocabulary, (batch, tokens), device=device)
    return Subject(model, (ids, ids) if mode == "train" else (ids,))


def _named(name: str, kernels: bool) -> nn.Module:
    """The model of a preset or a folder."""
    if name in PRESETS:
        return GPT(PRESETS[name], kernels=kernels)
    if name in LLAMA_PRESETS:
        return Llama(LLAMA_PRESETS[name])
    if Path(name).exists():
        return open_model(Path(name))[0]
    known = [*PRESETS, *LLAMA_PRESETS]
    near = get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"presets are {', '.join(known)}"
    raise UserError(
        f"MODEL is {name!r}, expected a preset, a folder, a .gguf file or module:function; {hint}"
    )


def _from_function(name: str, batch: int, length: int | None, device: str) -> Subject:
    where, _, attribute = name.rpartition(":")
    module = _import(where)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = get_close_matches(attribute, names, n=3) or names[:5]
        raise UserError(f"{where} has no function {attribute!r}; it has {', '.join(near) or 'none'}")
    try:
        made = function()
    except Exception as error:  # whatever somebody's function raises
        raise UserError(f"{name} raised {type(error).__name__}: {_first_line(error)}") from error
    model, *rest = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{name} returned {type(model).__name__}, expected a torch.nn.Module or (model, batch)"
        )
    model = model.to(device)
    if not rest:
        rest = [_tokens_for(model, name, batch, length or 128, device)]
    return Subject(model, *rest[:2])


def _tokens_for(model: nn.Module, name: str, batch: int, length: int, device: str) -> Tensor:
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise UserError(
            f"{name} returned a model without nn.Embedding; return (model, batch) to say what it takes"
        )
    return torch.randint(embedding.num_embeddings, (batch, length), device=device)


def _import(where: str) -> Any:
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            sys.path.insert(0, str(Path(where).parent))  # as if python ran it
            spec.loader.exec_module(module)
            return module
        sys.path.insert(0, "")
        return importlib.import_module(where)
    except Exception as error:  # whatever somebody's module raises
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"MODEL names {where!r}, which cannot be imported: {problem}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
