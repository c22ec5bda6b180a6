"""Training: the loop, its schedule, evaluation, checkpoints."""

from . import checkpoint
from .checkpoint import Checkpoint
from .loop import Record, TrainConfig, Trainer, evaluate
from .schedule import warmup_cosine

__all__ = ["Checkpoint", "Record", "TrainConfig", "Trainer", "checkpoint", "evaluate", "warmup_cosine"]
