"""Which token comes next: penalties and cuts of a distribution, and a draw from what is left.

A draw is a function of a sequence's seed and of the place in it, so neither the other sequences of a
batch nor the device's generator have a say in what is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; applied from top to bottom, as in Hugging Face.

    Attributes:
        repetition_penalty: scores of tokens that are in the text already are divided by it if positive,
            else multiplied; Keskar et al. 2019, CTRL, arXiv:1909.05858, sec. 4.1.
        temperature: divides the scores; 0 takes the most likely token.
        top_k: only the k most likely tokens; Fan et al. 2018, arXiv:1805.04833, sec. 5.4.  0 is all.
        top_p: only the fewest most likely tokens that together have this probability; Holtzman et al.
            2020, arXiv:1904.09751, sec. 3.1.
        min_p: only tokens at least so likely in proportion to the most likely one; Nguyen et al. 2024,
            arXiv:2407.01082.

    Raises:
        UserError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "1 or more, or 0 for all tokens")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")

    def choose(self, logits: Tensor, texts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Tensor:
        """The next token of each of n sequences.

        Args:
            logits: (n, V).
            texts: the tokens that each has so far.
            seeds: of each.

        Returns:
            (n,) int64, on the device of `logits`.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            logits = self._penalised(logits, texts)
        if self.temperature == 0:
            return logits.argmax(-1)
        draws = [uniform(seed, len(text)) for seed, text in zip(seeds, texts)]
        scores, tokens = self._sorted(logits / self.temperature)
        p = self._cut(scores.double().softmax(-1))
        total = p.cumsum(-1)  # (n, V or fewer)
        at = torch.tensor(draws, dtype=p.dtype, device=p.device)[:, None] * total[:, -1:]
        place = torch.searchsorted(total, at, right=True).clamp_(max=p.shape[1] - 1)  # (n, 1)
        return (place if tokens is None else tokens.gather(1, place))[:, 0]

    def _penalised(self, logits: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        logits = logits.clone()
        for row, text in zip(logits, texts):
            seen = torch.tensor(sorted(set(text)), dtype=torch.int64, device=row.device)
            scores = row[seen]
            factor = self.repetition_penalty
            row[seen] = torch.where(scores > 0, scores / factor, scores * factor)
        return logits

    def _sorted(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores that top_k leaves, highest first, and their tokens; None where order does not matter."""
        if 0 < self.top_k < scores.shape[-1]:
            return scores.topk(self.top_k)
        if self.top_p < 1:
            return scores.sort(descending=True, stable=True)
        return scores, None

    def _cut(self, p: Tensor) -> Tensor:
        """Probabilities with those that top_p and min_p leave out at 0; not normalised again."""
        if self.top_p < 1:  # p is sorted
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return p


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) that belongs to a seed and a place; Philox, Salmon et al. 2011."""
    return np.random.Generator(np.random.Philox(key=seed, counter=place)).random()


def _require(ok: bool, name: str, value: float, expected: str) -> None:
    if not ok:  # NaN is not, either
        raise UserError(f"{name} is {value}, expected {expected}")


GREEDY, UNCHANGED = Sampling(temperature=0.0), Sampling()
