"""Pipeline parallelism: stages of layers, micro-batches through them by torch's 1F1B schedule.

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from .norm import local


class Pipeline:
    """This process's stage, and its place among the others.

    Args:
        module: takes ids or x, and `targets`; gives x or, on the last stage, the sum of the losses, (1,).
        mesh: of all axes.
        width: of x.
        dtype: of x between stages.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, width: int, dtype: torch.dtype) -> None:
        self.module, self.mesh, self.width, self.dtype = module, mesh["pp"], width, dtype
        self.at, self.count = self.mesh.get_local_rank(), self.mesh.size()
        self.first, self.last = self.at == 0, self.at == self.count - 1
        self.divided = mesh["cp"].size() * mesh["tp"].size()  # ways in which a sequence is
        self.schedules: dict[tuple[int, ...], Schedule1F1B | ScheduleGPipe] = {}
        ranks = mesh.mesh.flatten(1).tolist()  # ORDER has pp first
        self.ends, _ = dist.new_subgroups_by_enumeration([list(pair) for pair in zip(ranks[0], ranks[-1])])

    def layers(self, count: int) -> range:
        """Those of this stage."""
        return range(count)[self.at * count // self.count : (self.at + 1) * count // self.count]

    def train(self, inputs: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        """Gradients of all rows, the loss of each micro-batch times its factor; returns their sum, on all.

        Args:
            inputs, targets: (R, T), the rows of all micro-batches.
            factors: (M,), one for each.
        """
        return self._run("step", inputs, targets, factors)

    def evaluate(self, inputs: Tensor, targets: Tensor, micro_batches: int) -> Tensor:
        """The sum of the losses of all rows, on all stages."""
        return self._run("eval", inputs, targets, torch.ones(micro_batches, device=targets.device))

    def _run(self, how: str, inputs: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        schedule = self._schedule(len(factors), *targets.shape)
        losses: list[Tensor] = []
        getattr(schedule, how)(
            *((inputs,) if self.first else ()),
            target=factors if self.last else None,
            losses=losses,
            targets=targets,
            return_outputs=False,
        )
        total = torch.zeros((), device=targets.device)
        if self.last:
            total = torch.stack([loss.detach().float() for loss in losses]).sum()
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def _schedule(self, micro_batches: int, rows: int, length: int) -> Schedule1F1B | ScheduleGPipe:
        """Made once for each shape, without a trial run: that would draw random numbers.

        torch's 1F1B wants a micro-batch for each stage; of fewer, GPipe holds no more at once.
        """
        key = micro_batches, rows, length
        if key not in self.schedules:
            each = rows // micro_batches
            ids = torch.empty(each, length, dtype=torch.int64, device="meta")
            shape = each, length // self.divided, self.width
            x = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
            stage = PipelineStage(
                self.module, self.at, self.count, torch.device(self.mesh.device_type),
                input_args=ids if self.first else x,
                output_args=torch.empty(1, device="meta") if self.last else x,
                group=self.mesh.get_group(),
            )  # fmt: skip
            kind = Schedule1F1B if micro_batches >= self.count else ScheduleGPipe
            self.schedules[key] = kind(stage, micro_batches, _weighted, scale_grads=False)
        return self.schedules[key]

    def sum_ends(self, tied: nn.Parameter | None) -> None:
        """Add the gradients of an embedding that is also the head: the first and the last stage have it."""
        if tied is not None and self.ends is not None:
            dist.all_reduce(local(tied.grad), group=self.ends)


def _weighted(loss: Tensor, factor: Tensor) -> Tensor:
    return (loss * factor).sum()
