"""Training: the loop, its schedule, evaluation, checkpoints."""

from . import checkpoint
from .checkpoint import Checkpoint
from .config import RunConfig, TrainConfig
from .loop import NotFinite, Record, Trainer, evaluate
from .schedule import warmup_cosine, warmup_stable_decay

__all__ = [
    "Checkpoint",
    "NotFinite",
    "Record",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "checkpoint",
    "evaluate",
    "warmup_cosine",
    "warmup_stable_decay",
]
