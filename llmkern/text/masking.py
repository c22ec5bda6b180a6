"""Masked batches for bidirectional encoders."""

import numpy as np
from torch import Tensor

from .batches import Batches

IGNORE = -100  # a target that is not predicted


class MaskedBatches:
    """`batches[step]` is a pair (inputs, targets) for masked language modelling.

    Of every window the same share of places is chosen.  Of these 80 % become the mask token, 10 % a
    random token and 10 % stay; all of them are predicted, and nothing else: targets are -100 there.

    Source: Devlin et al. 2019, BERT, arXiv:1810.04805, sec. 3.1 and appendix A.1.

    Args:
        batches: the windows.
        mask_token: what stands for a hidden token.
        vocab_size: random tokens are below it.
        share: of the places that are chosen.
        special: tokens that are never chosen, such as the end of a text.
    """

    def __init__(
        self,
        batches: Batches,
        mask_token: int,
        vocab_size: int,
        share: float = 0.15,
        special: tuple[int, ...] = (),
    ) -> None:
        self.batches, self.mask_token, self.vocab_size = batches, mask_token, vocab_size
        self.share, self.special = share, np.array(special, np.int64)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        b = self.batches
        inputs = b.tokens.windows(b.starts(step), b.block_size)  # (batch, block)
        random = np.random.default_rng((b.seed, step, b.rank, 2))
        order = random.random(inputs.shape)
        if len(self.special):
            order[np.isin(inputs, self.special)] = 2.0  # last
        count = max(1, round(self.share * b.block_size))
        chosen = np.argpartition(order, count - 1, axis=1)[:, :count]  # (batch, count)
        rows = np.arange(len(inputs))[:, None]
        targets = np.full_like(inputs, IGNORE)
        targets[rows, chosen] = np.where(order[rows, chosen] < 2, inputs[rows, chosen], IGNORE)
        fate = random.random(chosen.shape)
        strangers = random.integers(self.vocab_size, size=chosen.shape)
        hidden = np.where(fate < 0.8, self.mask_token, np.where(fate < 0.9, strangers, inputs[rows, chosen]))
        inputs[rows, chosen] = np.where(order[rows, chosen] < 2, hidden, inputs[rows, chosen])
        return b.place(inputs), b.place(targets)

    def starts(self, step: int) -> np.ndarray:
        """As of the windows below."""
        return self.batches.starts(step)
