"""Training: the loop, its schedule, evaluation."""

from .loop import Record, TrainConfig, Trainer, evaluate
from .schedule import warmup_cosine

__all__ = ["Record", "TrainConfig", "Trainer", "evaluate", "warmup_cosine"]
