"""A whole training step of a GPT: plain PyTorch, the same compiled, and swapped."""

from typing import NamedTuple

import torch
from torch import nn

import llmkern
from llmkern.models import GPT, GPTConfig

from .measure import Call

PEERS = ("llmkern", "eager", "compile")


class Step(NamedTuple):
    """A model and the batch that it trains on."""

    name: str
    config: GPTConfig
    batch: int
    dtype: torch.dtype  # bfloat16: under autocast

    @property
    def tokens(self) -> int:
        return self.batch * self.config.block_size


def steps() -> list[Step]:
    """The models of the targets, in float32 and under bfloat16 autocast."""
    shapes = {  # layers, heads, width, vocabulary, context, batch
        "4 x 128, 12 x 64": (4, 4, 128, 65, 64, 12),
        "6 x 384, 12 x 256": (6, 6, 384, 65, 256, 12),
        "GPT-2 124M, 2 x 512": (12, 12, 768, 50304, 512, 2),
    }
    result = []
    for name, (layers, heads, width, vocabulary, context, batch) in shapes.items():
        config = GPTConfig(
            vocab_size=vocabulary, block_size=context, n_layer=layers, n_head=heads, n_embd=width
        )
        result += [Step(name, config, batch, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return result


def calls(step: Step, names: list[str]) -> dict[str, Call]:
    """For each peer a function that makes one step: forward, backward, AdamW."""
    generator = torch.Generator().manual_seed(0)
    shape = step.batch, step.config.block_size
    tokens = torch.randint(step.config.vocab_size, shape, generator=generator)
    return {name: _call(step, name, tokens) for name in names}


def _call(step: Step, name: str, tokens: torch.Tensor) -> Call:
    torch.manual_seed(0)
    model: nn.Module = GPT(step.config, kernels=False)
    if name == "llmkern":
        llmkern.swap_(model)
        optimizer = llmkern.optim.AdamW(model.parameters(), 1e-4)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if name == "compile" else model

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=step.dtype == torch.bfloat16):
            _, loss = forward(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
