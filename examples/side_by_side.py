"""What the examples share: train a model and its swapped copy in turns, on the same batches, and compare."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import llmkern
from llmkern import text

LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Result(NamedTuple):
    """Of two trainings.

    Attributes:
        losses: of every step, (plain, swapped).
        seconds: of the median step, (plain, swapped).
    """

    losses: list[tuple[float, float]]
    seconds: tuple[float, float]

    @property
    def apart(self) -> float:
        """The largest difference of the losses of one step."""
        return max(abs(a - b) for a, b in self.losses)

    @property
    def speedup(self) -> float:
        return self.seconds[0] / self.seconds[1]


def train(
    model: nn.Module,
    loss_of: LossOf,
    batches: text.Batches,
    steps: int,
    compiled: bool = False,
    learning_rate: float = 1e-3,
) -> Result:
    """Train the model, and a copy after `swap_` or torch.compile, with AdamW; print losses and speed."""
    models = [model, copy.deepcopy(model)]
    if compiled:
        llmkern.backend.reset()
        models[1] = torch.compile(models[1], backend=llmkern.backend)
    else:
        print(llmkern.swap_(models[1]))  # the one line
    optimizers = [torch.optim.AdamW(m.parameters(), lr=learning_rate) for m in models]
    losses, times = [], ([], [])
    for step in range(steps):
        pair = []
        for m, optimizer, seconds in zip(models, optimizers, times):
            begin = time.perf_counter()
            loss = loss_of(m, *batches[step])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pair.append(loss.item())
            seconds.append(time.perf_counter() - begin)
        losses.append(tuple(pair))
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1:>4}/{steps}: loss plain {pair[0]:.4f}, swapped {pair[1]:.4f}", flush=True)
    if compiled:
        print(llmkern.backend.report)
    result = Result(losses, tuple(statistics.median(seconds) for seconds in times))
    print(
        f"losses at most {result.apart:.1e} apart; a step takes {result.seconds[0] * 1e3:.1f} ms plain, "
        f"{result.seconds[1] * 1e3:.1f} ms swapped: {result.speedup:.2f} times as fast"
    )
    return result


def shakespeare(data: str | None, batch_size: int, length: int) -> tuple[text.Batches, int]:
    """Batches of characters, and how many different ones there are."""
    corpus = text.load(data)
    tokenizer = text.CharTokenizer(corpus.text)
    tokens, _ = text.split(tokenizer.encode(corpus.text))
    return text.Batches(tokens, batch_size, length), len(tokenizer)
