"""Replicas that train apart, and agree from time to time: local SGD with outer steps, as DiLoCo has them.

Source: Douillard et al. 2023, DiLoCo, arXiv:2311.08105, algorithm 1; Stich 2018, Local SGD, arXiv:1805.09767.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

LEARNING_RATE, MOMENTUM = 0.7, 0.9  # of the outer optimizer, SGD with Nesterov momentum: DiLoCo, section 3.1


class OuterSteps:
    """Call `step` after each step of the optimizer of one replica.

    Every `every` steps the replicas average how far they came since they last agreed, take that for a
    gradient, and go on from where the outer optimizer steps to.  Inner moments stay a replica's own.

    Args:
        parameters: of this replica, equal on all.
        every: H, steps between; 1 / H of the bytes of DDP are sent.
        group: the replicas.
        learning_rate, momentum: of the outer optimizer; 1 and 0 average the weights, as local SGD does.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        every: int,
        group: dist.ProcessGroup | None = None,
        learning_rate: float = LEARNING_RATE,
        momentum: float = MOMENTUM,
    ) -> None:
        self.parameters, self.every, self.group, self.count = list(parameters), every, group, 0
        self.agreed = [p.detach().clone().requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.SGD(
            self.agreed, lr=learning_rate, momentum=momentum, nesterov=momentum > 0
        )

    @torch.no_grad()
    def step(self) -> bool:
        """Whether this was an outer step."""
        self.count += 1
        if self.count % self.every:
            return False
        for agreed, p in zip(self.agreed, self.parameters):
            agreed.grad = self._mean(agreed - p)
        self.optimizer.step()
        for agreed, p in zip(self.agreed, self.parameters):
            agreed.grad = None
            p.copy_(agreed)
        return True

    def _mean(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, group=self.group)
        return t / dist.get_world_size(self.group)
