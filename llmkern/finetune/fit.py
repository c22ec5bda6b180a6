"""Train epoch by epoch, stop when it no longer helps, and keep the best of it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evaluate import Predictability, Scores
from ..text.labelled import Examples
from ..train import TrainConfig, Trainer
from ..train.loop import IndexedBatches, NotFinite


class Epoch(NamedTuple):
    """What an epoch tells.

    Attributes:
        number: from 1.
        loss: mean of its steps' losses.
        held_out: what was measured after it.
        best: whether no epoch before had a smaller held-out loss.
        seconds: training and measuring.
    """

    number: int
    loss: float
    held_out: Scores | Predictability
    best: bool
    seconds: float


def fit(
    model: nn.Module,
    batches: IndexedBatches,
    epoch_steps: int,
    config: TrainConfig,
    measure: Callable[[], Scores | Predictability],
    patience: int,
    tell: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train; afterwards the parameters are those of the epoch with the smallest held-out loss.

    Args:
        model: its parameters with requires_grad are trained.
        batches: to train on.
        epoch_steps: steps of an epoch; config.steps is a multiple.
        config: how to train.
        measure: the model on held-out data.
        patience: epochs without a smaller held-out loss before it stops; 0 is never.
        tell: called after every epoch.

    Returns:
        The epochs.

    Raises:
        UserError: the loss is not finite.
    """
    trainer, epochs, best, since = Trainer(model, batches, config), [], {}, 0
    smallest = float("inf")
    while trainer.step < config.steps:
        start = time.perf_counter()
        losses = [_advance(trainer) for _ in range(epoch_steps)]
        held_out = measure()
        since = 0 if held_out.loss < smallest else since + 1
        if since == 0:
            smallest, best = held_out.loss, _trained(model)
        seconds = time.perf_counter() - start
        epochs.append(Epoch(len(epochs) + 1, sum(losses) / len(losses), held_out, since == 0, seconds))
        tell(epochs[-1])
        if patience and since == patience:
            break
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in best:
                p.copy_(best[name])
    model.eval()
    return epochs


def _advance(trainer: Trainer) -> float:
    try:
        return trainer.advance().loss
    except NotFinite as error:
        raise UserError(f"{error}; nothing was saved") from None


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def balanced_weights(examples: Examples, classes: int) -> Tensor:
    """(K,) n / (K n_k), so that every class weighs the same; scikit-learn's "balanced"."""
    counts = torch.bincount(torch.from_numpy(examples.classes), minlength=classes)
    return len(examples) / (classes * counts.clamp(min=1)).float()
