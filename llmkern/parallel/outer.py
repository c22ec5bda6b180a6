"""Replicas that train apart, and agree from time to time: local SGD with outer steps, as DiLoCo has them.

Source: Douillard et al. 2023, DiLoCo, arXiv:2311.08105, algorithm 1; Stich 2018, Local SGD, arXiv:1805.09767.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .norm import local

OWN, MOMENTUM = "own", "outer"  # fields of a parameter in a checkpoint, beside those of the inner optimizer


class Outer(NamedTuple):
    """How replicas agree.

    Attributes:
        every: H, steps between; 1 / H of the bytes of DDP are sent.
        learning_rate, momentum: of the outer optimizer, SGD with Nesterov momentum (DiLoCo, section 3.1); 1
            and 0 average the weights, as local SGD does.
    """

    every: int
    learning_rate: float = 0.7
    momentum: float = 0.9


class OuterSteps:
    """Call `step` after each step of the optimizer of one replica.

    Every `every` steps the replicas average how far they came since they last agreed, take that for a
    gradient, and go on from where the outer optimizer steps to.  Inner moments stay a replica's own.

    Args:
        parameters: of this replica, equal on all; of one that several processes share, this one's parts.
        outer: how.
        group: the replicas, or those of their processes that have the same parts.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], outer: Outer, group: dist.ProcessGroup | None = None
    ) -> None:
        self.parameters, self.every, self.group = list(parameters), outer.every, group
        self.agreed = [p.detach().clone().requires_grad_() for p in self.parameters]
        rate, momentum = outer.learning_rate, outer.momentum
        self.optimizer = torch.optim.SGD(self.agreed, rate, momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self, done: int) -> bool:
        """Whether this was an outer step; `done` steps of the inner optimizer are."""
        if done % self.every:
            return False
        for agreed, p in zip(self.agreed, self.parameters):
            agreed.grad = agreed - p
        works = [dist.all_reduce(local(a.grad), group=self.group, async_op=True) for a in self.agreed]
        for work, agreed in zip(works, self.agreed):
            work.wait()
            local(agreed.grad).div_(dist.get_world_size(self.group))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for agreed, p in zip(self.agreed, self.parameters):
            p.copy_(agreed)
        return True

    def tensors(self, parameters: dict[str, nn.Parameter], moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this replica adds to a checkpoint: the first the weights of the last outer step for all.

        Args:
            parameters: of this process, by name.
            moments: "parameter/field" -> tensor of the inner optimizer.

        Returns:
            "parameter/field.R" -> what replica R has for itself, its weights in the field `OWN`; and of the
            first "parameter" -> weights, "parameter/outer" -> momentum, in which all are the same.
        """
        replica = dist.get_rank(self.group)
        apart = moments | {f"{name}/{OWN}": p.detach() for name, p in parameters.items()}
        found = {f"{key}.{replica}": t for key, t in apart.items()}
        agreed = dict(zip(self.parameters, self.agreed))
        for name, p in parameters.items() if replica == 0 else ():
            found[name] = agreed[p].detach()
            buffer = self.optimizer.state.get(agreed[p], {}).get("momentum_buffer")
            if buffer is not None:  # there has been an outer step
                found[f"{name}/{MOMENTUM}"] = buffer
        return found

    @torch.no_grad()
    def load(self, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Go on where a replica was; parameters are as agreed now.

        Args:
            parameters: as above.
            tensors: "parameter/field" -> tensor, of this replica.

        Returns:
            Those of the inner optimizer.
        """
        agreed = dict(zip(self.parameters, self.agreed))
        rest = dict(tensors)
        for name, p in parameters.items():
            p.copy_(rest.pop(f"{name}/{OWN}"))
            buffer = rest.pop(f"{name}/{MOMENTUM}", None)
            if buffer is not None:
                self.optimizer.state[agreed[p]]["momentum_buffer"] = buffer
        return rest
