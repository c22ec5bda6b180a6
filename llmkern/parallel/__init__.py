"""The same models and the same training on many devices, by torch.distributed.

torchrun --nproc-per-node 2 -m llmkern train --parallel fsdp=2 ...
"""

from .engine import Parallel
from .mesh import Sizes, launched, start

__all__ = ["Parallel", "Sizes", "launched", "start"]
