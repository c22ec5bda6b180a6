"""Batches: random windows of a long text, each a pure function of (seed, step)."""

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


def split(tokens: Tensor, train: float = 0.9) -> tuple[Tensor, Tensor]:
    """The first part of the text to train on, the rest to validate with."""
    count = int(train * len(tokens))
    return tokens[:count], tokens[count:]


class Batches:
    """`batches[step]` is a pair (inputs, targets), both (batch_size, block_size) int64.

    The windows of a step depend on nothing but the seed and the step, so a run that resumes at a
    step, or a second run next to the first, sees the same batches without any state being kept.

    Args:
        tokens: (n,) int64, n > block_size.
        batch_size: windows in a batch.
        block_size: tokens in a window.
        seed: not negative.
        device: where the batches are made.
    """

    def __init__(
        self, tokens: Tensor, batch_size: int, block_size: int, seed: int = 0, device: str = "cpu"
    ) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"the text has {len(tokens)} tokens in this split, expected at least block size + 1 = "
                f"{block_size + 1}; give a longer text or a smaller block size"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}, expected 0 or more")
        self.tokens = tokens.to(device)
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        choices = len(self.tokens) - self.block_size
        starts = np.random.default_rng((self.seed, step)).integers(choices, size=self.batch_size)
        index = torch.from_numpy(starts)[:, None] + torch.arange(self.block_size)  # (batch, block)
        index = index.to(self.tokens.device)
        return self.tokens[index], self.tokens[index + 1]
