"""Whole training steps on a GPU: GPT-2 124M, and a Llama of Hugging Face with 1.2 B parameters."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import llmkern
from llmkern.models import GPT, preset

from .gpu_peers import importable
from .measure import Call


class Model(NamedTuple):
    """A model, made anew for each peer, its batch, and how much faster than each peer a step must be."""

    name: str
    make: Callable[[int], nn.Module]
    batch: int
    length: int
    against: dict[str, float]


def models() -> Iterator[Model]:
    """Both are trained in bfloat16 under autocast, with AdamW."""
    yield Model("GPT-2 124M", _gpt2, 16, 1024, {"compile": 1.15})
    if importable("transformers"):
        yield Model("Llama 3.2 1B", _llama, 2, 4096, {"compile": 1.15, "liger": 1.25})


def _gpt2(scale: int) -> nn.Module:
    config = preset("gpt2", vocab_size=50304) if scale == 1 else preset("nano")
    return GPT(config, kernels=False)


def _llama(scale: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 65}
    heads = (
        {"num_attention_heads": 32, "num_key_value_heads": 8} if scale == 1 else {"num_attention_heads": 4}
    )
    return LlamaForCausalLM(LlamaConfig(**(shape if scale == 1 else small), **heads))


def calls(model: Model, device: str, scale: int) -> Iterator[tuple[str, Callable[[], Call] | str]]:
    """(peer, what makes its step, or why it is not here); one after another, as each fills the memory."""
    yield "llmkern", lambda: _step(model, device, scale, swap=llmkern.swap_)
    yield "eager", lambda: _step(model, device, scale)
    if device == "cuda":
        yield "compile", lambda: _step(model, device, scale, wrap=torch.compile)
    else:
        yield "compile", "is for GPUs"
    if "liger" in model.against:
        there = device == "cuda" and importable("liger_kernel")
        yield "liger", (lambda: _step(model, device, scale, swap=_liger)) if there else "is not installed"


def _liger(net: nn.Module) -> None:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(net)


def _step(
    model: Model, device: str, scale: int,
    swap: Callable[[nn.Module], Any] = lambda net: None, wrap: Callable = lambda net: net,
) -> Call:  # fmt: skip
    torch.manual_seed(0)
    net = model.make(scale).to(device).train()
    swap(net)
    ours = swap is llmkern.swap_
    optimizer = (
        llmkern.optim.AdamW(net.parameters()) if ours else torch.optim.AdamW(net.parameters(), fused=True)
    )
    forward = wrap(net)
    shape = (model.batch, model.length) if scale == 1 else (2, 32)
    ids = torch.randint(65, shape, device=device)
    hugging = not isinstance(net, GPT)

    def call() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss if hugging else forward(ids, ids)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
