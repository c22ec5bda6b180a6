"""The processes of a run that train together: who leads, how the model is divided, what all agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.build import describe
from ..parallel.mesh import Sizes, launched, shape_of, start
from .checkpoint import MODEL, OPTIMIZER
from .config import RunConfig

if TYPE_CHECKING:
    from ..parallel import Parallel


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
        with self._one_voice():
            self.sizes = Sizes.parse(config.parallel)
            if config.dtype == "float16":
                raise UserError("parallel takes no dtype float16, expected bfloat16 or float32")
            s = self.sizes
            if s.pp > 1:
                raise UserError(f"parallel {s}: pp is not implemented, expected dp, fsdp, tp or cp")
            if config.saver != "none" and s.world != s.dp:
                raise UserError(f"saver is {config.saver} and parallel {s}: expected dp alone, or saver none")
            if config.nonfinite == "skip" and config.saver == "powersgd":
                raise UserError("saver powersgd keeps errors from step to step, expected nonfinite stop")
        self.part = (0, self.sizes.data)

    @contextmanager
    def _one_voice(self) -> Iterator[None]:
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

        self.description = describe(model)
        with self._one_voice():
            self.sizes.check(self.world, config.batch_size, config.block_size, shape_of(model.config))
        mesh = start(self.sizes, device, config.timeout)
        steps = self.collect(step)
        if len(set(steps)) > 1:
            raise UserError(
                f"out {config.out!r}: processes find checkpoints of steps {sorted(set(steps))}; it must be a "
                "folder that all nodes share"
            )
        with self._one_voice():
            self.parallel = parallel = Parallel(model, mesh, config.torch_dtype, config.saver)
        self.part = parallel.data_rank, parallel.data_world
        torch.manual_seed(config.seed + self.rank)  # each drops other elements
        return parallel

    def gather(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Whole tensors by file of a checkpoint, on the first process, and the fields that describe them."""
        from ..parallel import whole

        weights = dict(model.named_parameters())
        tensors, groups = whole.optimizer_tensors(optimizer, model)
        packed = self.parallel.packed
        files = {MODEL: whole.gather(weights, packed), OPTIMIZER: whole.gather(tensors, packed)}
        return files, {"model": self.description, "optimizer": groups}

    def divide_optimizer(
        self, model: nn.Module, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """This process's part of what `gather` gave."""
        from ..parallel import whole

        return whole.fill(model, tensors, self.parallel.packed), groups

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
        """The group; a process whose peers are gone does not wait for them."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def speaks() -> bool:
    """Whether this process tells the user what all processes of the launcher find."""
    return os.environ.get("RANK", "0") == "0"
