"""The training loop.

    for record in Trainer(model, batches, TrainConfig(steps=200)):
        print(record.step, record.loss)

A model is called as `model(inputs, targets)` and returns (logits, loss); batches are anything with
`batches[i] -> (inputs, targets)`.  Two trainers in a `zip` take turns, step by step.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..optim import AdamW
from .config import TrainConfig
from .schedule import learning_rate

if TYPE_CHECKING:
    from ..parallel import Parallel


class IndexedBatches(Protocol):
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]: ...


class Record(NamedTuple):
    """What one step tells."""

    step: int  # from 0
    loss: float  # mean over the tokens of the batch, in nats
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    seconds: float  # of the whole step, batch and optimizer included


class NotFinite(FloatingPointError):
    """A loss or gradient that is NaN or infinite.

    Attributes:
        step: the step, from 0; the parameters may be spoilt by it.
        batches: the numbers of its batches.
    """

    def __init__(self, what: str, value: float, step: int, batches: range) -> None:
        super().__init__(f"the {what} is {value} at step {step}; try a lower learning rate")
        self.step, self.batches = step, batches


class Trainer:
    """Iterate over it to train: each item is the `Record` of one step.

    Args:
        model: what to train, on its device.
        batches: step n takes those from n * accumulate on.
        config: how to train.
        optimizer: over the model's parameters; by default llmkern's AdamW.
        parallel: the model on a mesh of devices; then the batches are this process's.

    Attributes:
        step: number of steps done.
        scaler: of the loss in float16; does nothing in other dtypes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: IndexedBatches,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer | None = None,
        parallel: "Parallel | None" = None,
    ) -> None:
        self.model, self.batches, self.config, self.parallel = model, batches, config, parallel
        if optimizer is None and parallel is not None:
            optimizer = adamw(model, config, torch.optim.AdamW)
        self.optimizer = optimizer or adamw(model, config, AdamW, max_norm=config.grad_clip or None)
        device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.dtype == "float16")
        self.step = 0
        if config.activation_checkpointing:
            checkpoint_layers(model)

    def __iter__(self) -> Iterator[Record]:
        while self.step < self.config.steps:
            yield self.advance()

    def advance(self) -> Record:
        """Train one step.

        Raises:
            NotFinite: the loss or a gradient is not finite, unless the config says to skip it.
        """
        start = time.perf_counter()
        c = self.config
        rate = learning_rate(
            c.schedule, self.step, c.steps, c.warmup_steps, c.decay_steps or c.steps // 5,
            c.learning_rate, c.min_learning_rate,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss, tokens = self._backward()
        norm = self._update(loss)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.parallel is not None:
            self.parallel.agree(self.step)
        return Record(self.step - 1, loss, norm, rate, tokens, time.perf_counter() - start)

    def batch_numbers(self, step: int) -> range:
        """The numbers of the batches of a step."""
        return range(step * self.config.accumulate, (step + 1) * self.config.accumulate)

    def _backward(self) -> tuple[float, int]:
        """Gradients of the mean loss over all batches of the step; returns that loss, and the tokens."""
        if self.parallel is not None:
            batches = [self.batches[i] for i in self.batch_numbers(self.step)]
            loss_of = partial(compute_loss, dtype=self.config.torch_dtype)
            loss = self.parallel.backward(batches, loss_of)
            return loss, self.parallel.data_world * sum(inputs.numel() for inputs, _ in batches)
        total, tokens, share = None, 0, 1 / self.config.accumulate
        for i in self.batch_numbers(self.step):
            inputs, targets = self.batches[i]  # (batch, block)
            loss = compute_loss(self.model, inputs, targets, self.config.torch_dtype)
            self.scaler.scale(loss if share == 1 else loss * share).backward()
            total = loss.detach() if total is None else total + loss.detach()
            tokens += inputs.numel()
        return total.item() * share, tokens  # waits for the device

    def _update(self, loss: float) -> float:
        """Step the optimizer; returns the norm of the gradients."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        elif self.config.nonfinite == "skip" and not (math.isfinite(loss) and math.isfinite(self._norm())):
            return math.nan
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss)
        if isinstance(self.optimizer, AdamW) and self.optimizer.max_norm is not None:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)  # clips inside
            self.scaler.update()
            if self.scaler.get_scale() < scale:  # an overflow: the step was left out
                return math.inf
            norm = self.optimizer.grad_norm.item()
        else:
            norm = self._clip(self.config.grad_clip or math.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._not_finite("norm of the gradients", norm)
        return norm

    def _clip(self, max_norm: float) -> float:
        if self.parallel is not None:
            return self.parallel.clip_grad_norm_(max_norm)
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()

    def _norm(self) -> float:
        if self.parallel is not None:
            return self._clip(math.inf)
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()

    def _not_finite(self, what: str, value: float) -> NotFinite:
        return NotFinite(what, value, self.step, self.batch_numbers(self.step))


def compute_loss(model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's loss, under autocast unless `dtype` is float32."""
    if dtype == torch.float32:
        return model(inputs, targets)[1]
    with torch.autocast(inputs.device.type, dtype=dtype):
        return model(inputs, targets)[1]


def adamw(
    model: nn.Module, config: TrainConfig, kind: type[torch.optim.AdamW], **options: object
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that decays matrices and embeddings only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=config.learning_rate, betas=config.betas, **options)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the inputs of the model's layers, and compute the layers again in backward.

    The layers are the longest `nn.ModuleList` of the model.  Source: Chen et al. 2016, arXiv:1604.06174.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for layer in max(lists, key=len, default=()):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@torch.no_grad()
def evaluate(
    model: "nn.Module | Parallel", batches: IndexedBatches, steps: int, dtype: torch.dtype = torch.float32
) -> float:
    """Mean loss over the first `steps` batches, in nats per token; dropout is off."""
    training = model.training
    model.eval()
    losses = [compute_loss(model, *batches[step], dtype) for step in range(steps)]
    model.train(training)
    return torch.stack(losses).mean().item()
