"""Opens any model that a command is given: a run of ours, a Hugging Face folder, or a GGUF file."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .errors import UserError
from .models import from_pretrained, load_gguf
from .models.pretrained import CONFIG
from .quantize import Int4WeightOnly, Int8WeightOnly, quantize_
from .text import Tokenizer, load_tokenizer
from .text.tokenizer import FILE_NAME
from .train import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPS = (128, 64, 32)  # elements that share a scale at 4 bits, the first that divides every linear


class Loaded(NamedTuple):
    """A model in `eval` mode, and the tokenizer that it was trained with."""

    model: nn.Module
    tokenizer: Tokenizer


def load(
    path: str | os.PathLike,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike | None = None,
    quantize: str | None = None,
) -> Loaded:
    """The model at `path`, ready to run.

        model, tokenizer = llmkern.load.load("runs/shakespeare")

    Args:
        path: the folder of a run or of one of its checkpoints; a folder with a Hugging Face config.json; or a
            file that ends in .gguf.
        device: where to.
        dtype: of the weights; None is as they were saved.
        tokenizer: a tokenizer.json or its folder; None is the one beside the model.
        quantize: "int8" or "int4" rounds the weights of all linears.

    Raises:
        UserError: no model there, a broken one, or no tokenizer that fits it.
    """
    path = Path(path)
    model, own = open_model(path, dtype)
    if tokenizer is None and own is None:
        raise UserError(f"{str(path)!r} has no {FILE_NAME}; give the model's with --tokenizer")
    words = own if tokenizer is None else load_tokenizer(tokenizer)
    if len(words) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(words)} tokens, expected at most {model.config.vocab_size}, the "
            "vocabulary of the model; give the tokenizer that the model was trained with"
        )
    model = model.to(device=device, dtype=dtype)
    if quantize is not None:
        _quantize(model, quantize)
    return Loaded(model, words)


def open_model(path: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Tokenizer | None]:
    """The model at `path` on the CPU, and the tokenizer beside it, if there is one."""
    if not path.exists():
        raise UserError(
            f"{str(path)!r} does not exist; expected a run's folder, a Hugging Face folder, or a .gguf file"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{str(path)!r} is a file, expected a folder, or a file that ends in .gguf")
        return load_gguf(path, dtype or torch.float32), None
    if (path / CONFIG).is_file():
        own = load_tokenizer(path) if (path / FILE_NAME).is_file() else None
        return from_pretrained(path, dtype), own
    saved = checkpoint.load(path)
    return saved.build_model(), saved.tokenizer()


def _quantize(model: nn.Module, bits: str) -> None:
    config = Int8WeightOnly()
    if bits == "int4":
        widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
        config = Int4WeightOnly(next((g for g in GROUPS if all(w % g == 0 for w in widths)), GROUPS[-1]))
    left = quantize_(model, config).left
    if left:
        raise UserError(f"{bits} is not possible: {left[0].path} cannot be quantised, {left[0].note}")


def add_arguments(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """The arguments of every command that opens a model; `load_from` reads them.

    Without `weights` there are none that change the weights, which then are float32.
    """
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=
        "the folder of a run, a Hugging Face folder, or a .gguf file")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, if there is none beside the model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    if not weights:
        parser.set_defaults(dtype="float32", quantize=None)
        return
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights, by default as they were saved")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="round the weights of all linears")


def load_from(args: argparse.Namespace) -> Loaded:
    """The model that `add_arguments` was given."""
    return load(
        args.checkpoint, pick_device(args.device), DTYPES.get(args.dtype), args.tokenizer, args.quantize
    )


def pick_device(name: str) -> str:
    """ "auto" is a GPU if torch sees one; UserError for "cuda" if it sees none."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device is cuda, but this PyTorch sees no GPU; leave it out or use --device cpu")
    return ("cuda" if there else "cpu") if name == "auto" else name
