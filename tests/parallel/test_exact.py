"""Every way to divide training gives the losses, norms and weights of one process."""

import exact
import pytest
import torch
from exact import gpt, llama

from llmkern.parallel import Sizes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

CASES = {
    "DDP": (Sizes(dp=2), gpt, {}),
    "DDP, plain, accumulated": (Sizes(dp=2), lambda: gpt(kernels=False), {"accumulate": 2, "steps": 8}),
    "FSDP": (Sizes(fsdp=2), gpt, {}),
    "FSDP, plain": (Sizes(fsdp=2), lambda: gpt(kernels=False), {"steps": 8}),
    "FSDP, Llama, accumulated, checkpointed": (
        Sizes(fsdp=2), llama, {"accumulate": 2, "activation_checkpointing": True, "steps": 8}
    ),
}  # fmt: skip


def two() -> None:
    for name, case in CASES.items():
        exact.check(name, *case)
    exact.check("FSDP in bfloat16", Sizes(fsdp=2), gpt, {"dtype": "bfloat16", "steps": 5}, rtol=0.05)


def test_two_processes():
    exact.processes(2, two)
