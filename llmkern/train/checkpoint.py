"""Checkpoints: folders that hold all of a run, or do not exist.

    RUN/checkpoints/step-00000500/
        model.safetensors       the weights, of tied ones once
        optimizer.safetensors   "parameter/field" -> tensor
        state.json              step, model, config, optimizer groups, generators, data, scaler, versions
        tokenizer.json
        manifest.json           size and sha256 of each

Of a run by many processes, shards stand in the place of the first two (`sharded.py`).

There is no pickle in it.  A checkpoint with a byte too few, too many or changed is found and passed over.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import durable
from ..durable import Damaged
from ..errors import UserError
from ..models.build import build, describe
from ..text.tokenizer import Tokenizer, load_tokenizer
from . import sharded
from .tensors import fill_module, module_tensors, optimizer_state, read_safetensors, safetensors_pieces

FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE, TOKENIZER = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
)
FORMAT = 1  # of the folder; a reader refuses what is newer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was compared with its checksum.

    Attributes:
        folder: where it is.
        state: what state.json holds; "step" is the number of steps done, "model" what `build` takes.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def model_tensors(self) -> dict[str, Tensor]:
        """Name -> weight, on the CPU."""
        if (self.folder / MODEL).exists():
            return read_safetensors(self.folder / MODEL)
        return sharded.read(self.folder, lambda key: "/" not in key, self.packed)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """ "parameter/field" -> tensor, on the CPU."""
        if (self.folder / OPTIMIZER).exists():
            return read_safetensors(self.folder / OPTIMIZER)
        return sharded.read(self.folder, lambda key: "/" in key, self.packed)

    @property
    def packed(self) -> dict[str, int]:
        """Parameters whose rows are in another order, as `llmkern.parallel` has them."""
        return self.state.get("packed", {})

    @property
    def replicas(self) -> int:
        """Replicas that trained apart, each with fields "field.R" of its own; 0 if there are none."""
        return self.state.get("replicas", 0)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.folder / TOKENIZER)

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model of the same shape; UserError if it has another."""
        fill_module(model, self.model_tensors(), f"checkpoint {str(self.folder)!r}")

    def build_model(self, kernels: bool = True) -> nn.Module:
        """A new model with these weights, in `eval` mode, on the CPU."""
        with torch.random.fork_rng(devices=[]):  # its fresh weights are not kept
            model = build(self.state["model"], kernels)
        self.load_into(model)
        return model.eval()


def save(
    run: Path,
    step: int,
    model: nn.Module,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint of one of our models, and remove all but the newest `keep`.

    Args:
        run: the run's folder.
        step: number of steps done.
        model: a model that `llmkern.models.describe` knows.
        tokenizer: its tokenizer.
        optimizer: over the model's parameters; None for weights alone.
        state: more fields of state.json, plain values.
        keep: 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full or not writable; all earlier checkpoints are as they were.
    """
    tensors, groups = optimizer_state(optimizer, dict(model.named_parameters())) if optimizer else ({}, [])
    fields = {**(state or {}), "model": describe(model), "optimizer": groups}

    def fill(folder: durable.NewFolder) -> None:
        folder.write(MODEL, safetensors_pieces(module_tensors(model)))
        folder.write(OPTIMIZER, safetensors_pieces(tensors))

    return write(run, step, fill, tokenizer, fields, keep)


def write(
    run: Path,
    step: int,
    fill: Callable[[durable.NewFolder], None],
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """The same, where `fill` writes the tensors, and `state` describes model and optimizer."""
    fields = {**state, "format": FORMAT, "step": step, "tokenizer_sha256": tokenizer.sha256()}
    path = path_of(run, step)
    try:
        with durable.NewFolder(path) as folder:
            fill(folder)
            folder.write(TOKENIZER, [tokenizer.to_json().encode()])
            folder.write(STATE, [json.dumps(fields, indent=1).encode()])
        prune(path, keep)
    except OSError as error:
        raise UserError(
            f"the checkpoint of step {step} cannot be written to {str(path.parent)!r} ({error.strerror}); "
            f"{_last_good(run)}; make room and start the same command again"
        ) from None
    return path


def path_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / FOLDER / f"step-{step:08d}"


def _last_good(run: Path) -> str:
    names = [path.name for path in folders(run)]
    return f"the last good one is {names[-1]}, as it was" if names else "there is none before it"


def prune(newest: Path, keep: int) -> None:
    """Remove the checkpoints of the run before the last `keep` up to `newest`, a whole one; 0 keeps all."""
    upto = [path for path in folders(newest.parent.parent) if path.name <= newest.name]
    for path in upto[:-keep] if keep else []:
        durable.remove(path)


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged."""
    root = run / FOLDER
    return sorted(root.glob("step-*")) if root.is_dir() else []


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every byte compared with its checksum.

    Raises:
        Damaged: it is not as it was written.
        UserError: a newer llmkern wrote it.
    """
    durable.verify(folder)
    try:
        state = json.loads((folder / STATE).read_bytes())
        number = state["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"{STATE} is missing or not one of a checkpoint") from None
    if number > FORMAT:
        raise UserError(
            f"checkpoint {str(folder)!r} has format {number}, expected at most {FORMAT}; update llmkern"
        )
    return Checkpoint(folder, state)


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None if it has none at all.

    Args:
        run: the run's folder.
        warn: called with a sentence for each damaged one that is passed over.

    Raises:
        UserError: all of them are damaged.
    """
    found = folders(run)[::-1]
    for folder in found:
        try:
            return read(folder)
        except Damaged as error:
            warn(f"checkpoint {str(folder)!r} is damaged and passed over: {error}")
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {str(run / FOLDER)!r} are damaged; copy a good one there, or "
            "start in another folder"
        )
    return None


def load(path: str | os.PathLike, warn: Callable[[str], None] | None = None) -> Checkpoint:
    """The checkpoint in the folder `path`, or the newest whole one of the run `path`.

        model = load("runs/shakespeare").build_model()

    Args:
        path: a run, or one checkpoint of it.
        warn: called with a sentence for each damaged one that is passed over; by default `warnings.warn`.

    Raises:
        UserError: no checkpoint there, or it is damaged.
    """
    path = Path(path)
    if (path / durable.MANIFEST).exists() or path.name.startswith("step-"):
        try:
            return read(path)
        except Damaged as error:
            raise UserError(
                f"checkpoint {str(path)!r} is damaged: {error}; take another of that run"
            ) from None
    found = newest(path, warn or _warn)
    if found is None:
        raise UserError(
            f"{str(path)!r} holds no checkpoint; expected the folder of a run, or {FOLDER}/step-... in it"
        )
    return found


def _warn(sentence: str) -> None:
    import warnings

    warnings.warn(sentence, stacklevel=4)
