"""Batches: windows of a long text, each a pure function of (seed, epoch, step, rank)."""

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .shards import Tokens

ORDERS = ("epochs", "random")


def split(tokens: Tensor, train: float = 0.9) -> tuple[Tensor, Tensor]:
    """The first part of the text to train on, the rest to validate with."""
    count = int(train * len(tokens))
    return tokens[:count], tokens[count:]


class Batches:
    """`batches[step]` is a pair (inputs, targets), both (batch_size, block_size) int64.

    The windows of a step depend on nothing but the arguments and the step, so a run that resumes at a
    step, or a second run next to the first, sees the same batches without any state being kept.

    Args:
        tokens: (n,) int64, or `Tokens` on a disk; n > block_size.
        batch_size: windows in a batch, of this rank.
        block_size: tokens in a window.
        seed: not negative.
        device: where the batches go.
        order: "random" takes windows anywhere, as nanoGPT does; "epochs" takes windows that lie side by
            side, each once in an epoch, in another order and with another start in every epoch.
        rank, world: which part of each step's world * batch_size windows this is; together the ranks
            see what one process would see with that batch.

    Raises:
        UserError: too few tokens for one window; a negative seed.
    """

    def __init__(
        self,
        tokens: Tensor | Tokens,
        batch_size: int,
        block_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        order: str = "random",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(tokens) < block_size + 1:
            raise UserError(
                f"the text has {len(tokens)} tokens in this split, expected at least block size + 1 = "
                f"{block_size + 1}; give a longer text or a smaller block size"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}, expected 0 or more")
        if order not in ORDERS:
            raise UserError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
        self.tokens = tokens if isinstance(tokens, Tokens) else Tokens([tokens.numpy()])
        self.batch_size, self.block_size, self.seed, self.order = batch_size, block_size, seed, order
        self.rank, self.world = rank, world
        self.device = torch.device(device)
        self._epochs: dict[int, np.ndarray] = {}  # of the last epochs, the starts in their order

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        windows = self.tokens.windows(self.starts(step), self.block_size + 1)
        inputs, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
        return self.place(inputs), self.place(targets)

    def place(self, array: np.ndarray) -> Tensor:
        """An array as a tensor on the device; a GPU fetches it while it works."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def starts(self, step: int) -> np.ndarray:
        """(batch_size,) positions in the text at which the windows of this rank begin."""
        total = self.batch_size * self.world
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        if self.order == "random":
            choices = len(self.tokens) - self.block_size
            return np.random.default_rng((self.seed, step)).integers(choices, size=total)[mine]
        windows = np.arange(step * total, (step + 1) * total)[mine]
        epochs, places = np.divmod(windows, self.epoch_windows)
        return np.array([self._epoch(e)[p] for e, p in zip(epochs.tolist(), places.tolist())], np.int64)

    @property
    def epoch_windows(self) -> int:
        """Windows in an epoch of order "epochs"; less than two windows of the text are left out."""
        return max(1, (len(self.tokens) - self.block_size) // self.block_size)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The starts of an epoch in their order."""
        if epoch not in self._epochs:
            count, block = self.epoch_windows, self.block_size
            random = np.random.default_rng((self.seed, epoch, 1))
            slack = min(block, len(self.tokens) - count * block)  # at least 1, the last target
            starts = random.integers(slack) + block * random.permutation(count)
            last = dict(list(self._epochs.items())[-1:])  # a batch may lie in two epochs
            self._epochs = {**last, epoch: starts}
        return self._epochs[epoch]
