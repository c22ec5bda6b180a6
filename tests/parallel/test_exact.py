"""Every way to divide training gives the losses, norms and gradients of one process."""

import exact
import pytest
import torch
from exact import gpt, llama

from llmkern.parallel import Sizes, tensor
from llmkern.swap import swap_

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def plain():
    return gpt(kernels=False)


def swapped():
    model = plain()
    swap_(model)
    return model


def tied():
    return llama(tie_word_embeddings=True, qk_norm=True)


SHORT = {"steps": 6}
ACCUMULATED = {**SHORT, "accumulate": 2}
SAVING = {**ACCUMULATED, "activation_checkpointing": True}

TWO = {
    "DDP": (Sizes(dp=2), gpt, {}),
    "DDP, plain, accumulated": (Sizes(dp=2), plain, ACCUMULATED),
    "FSDP": (Sizes(fsdp=2), gpt, {}),
    "FSDP, Llama, accumulated, recomputed": (Sizes(fsdp=2), llama, SAVING),
    "TP": (Sizes(tp=2), gpt, {}),
    "TP, Llama, accumulated, recomputed": (Sizes(tp=2), llama, SAVING),
    "CP": (Sizes(cp=2), gpt, {}),
    "CP, Llama, accumulated": (Sizes(cp=2), llama, ACCUMULATED),
    "PP": (Sizes(pp=2), gpt, {}, 2),
    "PP, Llama, accumulated, recomputed": (Sizes(pp=2), llama, SAVING),
}
FOUR = {
    "FSDP and PP": (Sizes(fsdp=2, pp=2), gpt, {}),
    "TP and PP, accumulated": (Sizes(tp=2, pp=2), tied, ACCUMULATED),
    "CP and PP": (Sizes(cp=2, pp=2), gpt, SHORT),
    "DDP": (Sizes(dp=4), gpt, {}),
    "FSDP": (Sizes(fsdp=4), tied, {}),
    "FSDP, replicated": (Sizes(dp=2, fsdp=2), gpt, {}),
    "TP": (Sizes(tp=4), gpt, {}),
    "CP": (Sizes(cp=4), llama, {}),
    "FSDP and TP": (Sizes(fsdp=2, tp=2), gpt, {}),
    "FSDP and TP, Llama, accumulated, recomputed": (Sizes(fsdp=2, tp=2), tied, SAVING),
    "replicas of TP": (Sizes(dp=2, tp=2), gpt, {}),
    "FSDP and CP": (Sizes(fsdp=2, cp=2), gpt, {}),
    "TP and CP": (Sizes(tp=2, cp=2), llama, {}),
}
WAYS = {"DDP": Sizes(dp=2), "FSDP": Sizes(fsdp=2), "TP": Sizes(tp=2), "CP": Sizes(cp=2)}
ALL = {
    f"{name}, {make.__name__}": (sizes, make, {})
    for make in (plain, swapped, tied)
    for name, sizes in WAYS.items()
}


def check(cases: dict) -> None:
    for name, case in cases.items():
        exact.check(name, *case)


def low() -> None:
    """bfloat16 rounds other sums than one process does."""
    for name, sizes in {**WAYS, "PP": Sizes(pp=2)}.items():
        exact.check(f"{name} in bfloat16", sizes, gpt, {"dtype": "bfloat16", "steps": 5}, rtol=0.05)


def planted() -> None:
    """Norms keep the gradients of this process's tokens."""
    tensor.sum_replicated = lambda model, mesh: None
    with pytest.raises(AssertionError, match="TP: step 0 gives"):
        exact.check("TP", Sizes(tp=2), gpt, {"steps": 2})


def test_two_processes():
    exact.processes(2, check, TWO)


@pytest.mark.slow
def test_two_processes_more():
    exact.processes(2, check, ALL)
    exact.processes(2, low)


@pytest.mark.slow
def test_a_wrong_gradient_is_seen():
    exact.processes(2, planted)


@pytest.mark.slow
def test_four_processes():
    exact.processes(4, check, FOUR)
