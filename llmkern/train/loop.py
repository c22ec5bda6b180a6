"""The training loop.

    for record in Trainer(model, batches, TrainConfig(steps=200)):
        print(record.step, record.loss)

A model is called as `model(inputs, targets)` and returns (logits, loss); batches are anything with
`batches[step] -> (inputs, targets)`.  Two trainers in a `zip` take turns, step by step.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .schedule import warmup_cosine


class IndexedBatches(Protocol):
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TrainConfig:
    """How to train.  Parameters with fewer than two dimensions (biases, norms) do not decay."""

    steps: int
    learning_rate: float = 1e-3  # at the end of the warm-up
    min_learning_rate: float = 1e-4  # at the last step
    warmup_steps: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0  # greatest norm of all gradients together
    dtype: torch.dtype = torch.float32  # bfloat16: autocast; the parameters stay in float32


class Record(NamedTuple):
    """What one step tells."""

    step: int  # from 0
    loss: float  # mean over the tokens of the batch, in nats
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    seconds: float  # of the whole step, batch and optimizer included


class Trainer:
    """Iterate over it to train: each item is the `Record` of one step."""

    def __init__(self, model: nn.Module, batches: IndexedBatches, config: TrainConfig) -> None:
        self.model, self.batches, self.config = model, batches, config
        self.optimizer = adamw(model, config)
        self.step = 0

    def __iter__(self) -> Iterator[Record]:
        while self.step < self.config.steps:
            yield self.advance()

    def advance(self) -> Record:
        """Train one step.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        start = time.perf_counter()
        config = self.config
        rate = warmup_cosine(
            self.step, config.steps, config.warmup_steps, config.learning_rate, config.min_learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        inputs, targets = self.batches[self.step]  # (batch, block)
        loss = compute_loss(self.model, inputs, targets, config.dtype)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device: only now is the step done
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}; try a lower learning rate")
        self.step += 1
        seconds = time.perf_counter() - start
        return Record(self.step - 1, value, norm.item(), rate, inputs.numel(), seconds)


def compute_loss(model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's loss, under autocast unless `dtype` is float32."""
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
        _, loss = model(inputs, targets)
    return loss


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that decays matrices and embeddings only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: IndexedBatches, steps: int, dtype: torch.dtype = torch.float32
) -> float:
    """Mean loss over the first `steps` batches, in nats per token; dropout is off."""
    training = model.training
    model.eval()
    losses = [compute_loss(model, *batches[step], dtype) for step in range(steps)]
    model.train(training)
    return torch.stack(losses).mean().item()
