"""The processes of a run that train together: who leads, how the model is divided, what all agree on."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..durable import NewFolder
from ..errors import UserError
from ..models.build import describe
from ..parallel.mesh import Sizes, launched, shape_of, start
from ..text.tokenizer import Tokenizer
from . import checkpoint, sharded
from .config import RunConfig
from .tensors import fill_optimizer, optimizer_state

if TYPE_CHECKING:
    from ..parallel import Parallel
    from ..parallel.outer import Outer

SETTLED = 0.2  # seconds


class Team:
    """This process among those that torchrun started.

    Args:
        config: of the run; `config.parallel` says the mesh.

    Attributes:
        rank, world: of this process, and how many there are.
        part: (which, of how many) parts of each batch this process takes; known before the mesh is.

    Raises:
        UserError: no launcher, or a mesh that makes no sense.
    """

    def __init__(self, config: RunConfig) -> None:
        self.rank, self.world = launched()
        with self.one_voice():
            self.sizes = Sizes.parse(config.parallel)
            if config.dtype == "float16":
                raise UserError("parallel takes no dtype float16, expected bfloat16 or float32")
            s = self.sizes
            windows = config.batch_size // s.data
            if s.pp > 1 and windows % config.micro_batch:
                raise UserError(
                    f"micro_batch is {config.micro_batch}, which does not divide the {windows} windows that "
                    "a process takes of a batch"
                )
            if config.saver != "none" and s.world != s.dp:
                raise UserError(f"saver is {config.saver} and parallel {s}: expected dp alone, or saver none")
            if config.saver != "none" and config.outer_every:
                raise UserError(f"saver is {config.saver} and outer_every {config.outer_every}: expected one")
            if config.outer_every and config.steps % config.outer_every:
                raise UserError(
                    f"outer_every is {config.outer_every}, which does not divide steps {config.steps}; what "
                    "replicas learn behind the last outer step would be lost"
                )
            if config.nonfinite == "skip" and config.saver == "powersgd":
                raise UserError("saver powersgd keeps errors from step to step, expected nonfinite stop")
        self.part = (0, self.sizes.data)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Around what all processes find wrong alike: the first says it, the others end."""
        try:
            yield
        except UserError:
            if self.rank:
                raise SystemExit(2) from None
            raise

    def divide(self, model: nn.Module, config: RunConfig, device: str, step: int) -> "Parallel":
        """Join the others, and place a model on the mesh; all have read the checkpoint of the same step."""
        from ..parallel import Parallel

        self.description, self.order = describe(model), [name for name, _ in model.named_parameters()]
        with self.one_voice():
            self.sizes.check(self.world, config.batch_size, config.block_size, shape_of(model.config))
        mesh = start(self.sizes, device, config.timeout)
        steps = self.collect(step)
        if len(set(steps)) > 1:
            raise UserError(
                f"out {config.out!r}: processes find checkpoints of steps {sorted(set(steps))}; it must be a "
                "folder that all nodes share"
            )
        with self.one_voice():
            self.parallel = parallel = Parallel(
                model, mesh, config.torch_dtype, config.saver, config.micro_batch, outer_of(config)
            )
        self.part = parallel.data_rank, parallel.data_world
        torch.manual_seed(config.seed + self.rank)  # each drops other elements
        return parallel

    def save(
        self, run: Path, step: int, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer,
        state: dict[str, Any], keep: int,
    ) -> Path:  # fmt: skip
        """Write a checkpoint together: each process its parts, the first all else, and the name last."""
        parameters = self.parallel.parameters()
        moments, groups = optimizer_state(optimizer, parameters)
        tensors = {name: p.detach() for name, p in parameters.items()} | moments
        if self.parallel.outer is not None:
            tensors = self.parallel.outer.tensors(parameters, moments)
        if self.parallel.copy is not None:  # the first stage has the same
            copy = self.parallel.names["lm_head.weight"]
            tensors = {key: t for key, t in tensors.items() if key.split("/")[0] != copy}
        packed = {name: heads for each in self.collect(self.parallel.packed) for name, heads in each.items()}
        every = self.collect(groups)
        path = checkpoint.path_of(run, step)

        def fill(folder: NewFolder) -> None:
            self.wait()  # the folder is there
            for files in self.collect(sharded.write(folder.part, tensors, self.rank)):
                folder.files |= files
            # all have looked before the first gives the folder another name
            if lost := [name for names in self.collect(self.lost(folder)) for name in names]:
                raise UserError(
                    f"out {str(run)!r} has no {lost[0]}; it must be a folder that all nodes share"
                )

        if self.rank == 0:
            fields = {"model": self.description, "optimizer": self._join(every), "packed": packed}
            if self.parallel.outer is not None:
                fields["replicas"] = self.sizes.dp
            checkpoint.write(run, step, fill, tokenizer, state | fields, keep)
        else:
            fill(NewFolder(path))
        self.wait()
        return path

    def lost(self, folder: NewFolder) -> list[str]:
        """The files of all processes that this one does not see."""
        return [name for name in folder.files if not (folder.part / name).exists()]

    def _join(self, every: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The groups of all stages as one, in the order of the undivided model."""
        joined = []
        for parts in zip(*every):
            names = {name for part in parts for name in part["params"]}
            joined.append({**parts[0], "params": [name for name in self.order if name in names]})
        return joined

    def fill_optimizer(self, optimizer: torch.optim.Optimizer, found: checkpoint.Checkpoint) -> None:
        """This process's part of the optimizer of a checkpoint, whoever wrote it."""
        parameters = self.parallel.parameters()
        _, now = optimizer_state(optimizer, parameters)
        saved = found.state["optimizer"]
        groups = [
            {**group, "params": [name for name in mine["params"] if name in group["params"]]}
            for mine, group in zip(now, saved)
        ]
        tensors = sharded.read_parts(found.folder, self.parallel, found.packed, found.replicas)
        if self.parallel.outer is not None:
            tensors = self.parallel.outer.load(parameters, tensors)
        fill_optimizer(optimizer, parameters, tensors, groups)

    @contextmanager
    def watch(self, step: Callable[[], int]) -> Iterator[None]:
        """Around training: an exchange that fails names itself, this rank, and the ranks that are silent."""
        from ..parallel import watch

        try:
            yield
        except RuntimeError as error:
            store = torch.distributed.distributed_c10d._get_default_store()
            told = watch.explain(error, store, self.rank, self.world, step())
            if told is None:
                raise
            raise UserError(told) from None

    def agree(self, number: int) -> int:
        """The largest number that any process gives."""
        return max(self.collect(number))

    def collect(self, value: Any) -> list[Any]:
        """What every process gives, by rank."""
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        torch.distributed.barrier()

    def leave(self) -> None:
        """The group; a process whose peers are gone does not wait for them.

        A thread of gloo may hold the tensors of the last exchange a moment longer than who waited for it, and
        one that frees them while Python shuts down aborts the process (before Python 3.14).
        """
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            time.sleep(SETTLED)


def team_of(config: RunConfig) -> Team | None:
    """The processes that train together, or None if this one is alone.

    Raises:
        UserError: as `Team`; a key that says how replicas exchange, and there are none.
    """
    if config.parallel:
        return Team(config)
    for name, off in (("saver", "none"), ("outer_every", 0)):
        if (value := getattr(config, name)) != off:
            raise UserError(f"{name} is {value}, and there are no replicas; give parallel dp=N too, or {off}")
    return None


def outer_of(config: RunConfig) -> "Outer | None":
    """How replicas agree, or None if they exchange gradients."""
    from ..parallel.outer import Outer

    rate, momentum = config.outer_learning_rate, config.outer_momentum
    return Outer(config.outer_every, rate, momentum) if config.outer_every else None


def speaks() -> bool:
    """Whether this process tells the user what all processes of the launcher find."""
    return os.environ.get("RANK", "0") == "0"
