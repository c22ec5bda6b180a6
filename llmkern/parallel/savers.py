"""Fewer bytes between replicas: torch's gradient compression."""

from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.nn.parallel import DistributedDataParallel

START = 10  # steps whose gradients PowerSGD sends whole, while they change fast; torch's own least is 2
RANK = 4  # of its matrices


def register(ddp: DistributedDataParallel, saver: str, group: Any) -> None:
    """Have gradients sent in bfloat16, or as matrices of low rank with the error fed back.

    Source: Vogels et al. 2019, PowerSGD, arXiv:1905.13727, algorithm 2.
    """
    if saver == "bf16":
        ddp.register_comm_hook(group, default_hooks.bf16_compress_hook)
    elif saver == "powersgd":
        state = power_sgd.PowerSGDState(group, matrix_approximation_rank=RANK, start_powerSGD_iter=START)
        ddp.register_comm_hook(state, power_sgd.powerSGD_hook)
