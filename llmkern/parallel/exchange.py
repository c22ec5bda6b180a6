"""Exchanges that gradients pass through, in tensor parallelism with the sequence divided between products.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2: g gathers before the first product of a part
and scatters in backward; its conjugate sums and scatters behind the second, and gathers in backward.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(B, T / n, C) of each process to the whole (B, T, C) on all; its gradients are terms of a sum."""
    return _exchanged(x, mesh, Shard(1), Replicate()).to_local(grad_placements=[Partial()])


def scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Terms (B, T, C) of a sum to (B, T / n, C), this process's part of it."""
    return _exchanged(x, mesh, Partial(), Shard(1)).to_local()


def total(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Terms of a sum to the sum, on all; all compute the same with it, so its gradient passes as it is."""
    return _exchanged(x, mesh, Partial(), Replicate()).to_local()


def _exchanged(x: Tensor, mesh: DeviceMesh, before: Placement, after: Placement) -> DTensor:
    return DTensor.from_local(x, mesh, [before], run_check=False).redistribute(placements=[after])
