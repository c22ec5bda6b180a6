"""Fewer bytes between replicas: torch's gradient compression."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

START = 10  # steps whose gradients PowerSGD sends whole, while they change fast; torch's own least is 2
RANK = 4  # of its matrices


def register(ddp: DistributedDataParallel, saver: str, group: Any) -> None:
    """Have gradients sent in bfloat16, or as matrices of low rank with the error fed back.

    Source: Vogels et al. 2019, PowerSGD, arXiv:1905.13727, algorithm 2.
    """
    if saver == "bf16":
        ddp.register_comm_hook(group, in_bfloat16)
    elif saver == "powersgd":
        state = power_sgd.PowerSGDState(group, matrix_approximation_rank=RANK, start_powerSGD_iter=START)
        ddp.register_comm_hook(state, power_sgd.powerSGD_hook)


def in_bfloat16(group: Any, bucket: dist.GradBucket) -> Future[Tensor]:
    """torch's hook, which DDP refuses by its name where there is no NCCL; gloo sums bfloat16 as well."""
    return default_hooks.bf16_compress_hook(group, bucket)
