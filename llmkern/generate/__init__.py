"""Text from a model: sampling, batches of prompts, streaming."""

from .engine import Engine, ModelEngine
from .loop import Output, generate
from .sampling import GREEDY, Sampling
from .text import Completion, complete
from .writer import Writer

__all__ = [
    "GREEDY",
    "Completion",
    "Engine",
    "ModelEngine",
    "Output",
    "Sampling",
    "Writer",
    "complete",
    "generate",
]
