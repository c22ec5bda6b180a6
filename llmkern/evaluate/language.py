"""How well a text is predicted: loss, perplexity, bits per byte."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

IGNORE = -100  # a target that is not predicted


class Predictability(NamedTuple):
    """What a causal model makes of a text.

    Attributes:
        nats: the sum of -log p over all predicted tokens.
        tokens: how many were predicted.
        bytes: of the predicted text in UTF-8, or None if that is not known.
    """

    nats: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; Gao et al. 2020, The Pile, arXiv:2101.00027, sec. 3.1."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def summary(self) -> dict:
        """All of it as plain values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def predictability(
    model: nn.Module, tokens: Tensor, stride: int | None = None, batch_size: int = 8, bytes: int | None = None
) -> Predictability:
    """How well a causal model predicts a text: every token but the first, each once.

    Windows of the model's context, `stride` tokens apart; of each only the tokens that no window before it
    has predicted count.  A smaller stride shows each token more of what comes before it, and takes longer.

    Args:
        model: of ours, in any mode, which is kept.
        tokens: (n,) at least 2.
        stride: 1 to the context; None is the context.
        batch_size: windows at once.
        bytes: of the text without its first token.

    Raises:
        UserError: too few tokens; a stride out of range; a model that predicts no next token.
    """
    context = model.config.block_size
    stride = context if stride is None else stride
    if not hasattr(model, "new_caches"):
        raise UserError(f"a {type(model).__name__} predicts no next token, expected a causal language model")
    if len(tokens) < 2:
        raise UserError(f"the text has {len(tokens)} tokens, expected at least 2 to predict one")
    if not 1 <= stride <= context:
        raise UserError(f"stride is {stride}, expected 1 to the context, {context}")
    windows = _windows(len(tokens) - 1, context, stride)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    nats = 0.0
    for start in range(0, len(windows), batch_size):
        nats += _nats(model, tokens, windows[start : start + batch_size], device)
    model.train(training)
    return Predictability(nats, len(tokens) - 1, bytes)


def _windows(inputs: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end) of inputs, and the first whose prediction counts."""
    windows, done = [], 0
    while done < inputs:
        end = min(inputs, context if not windows else windows[-1][1] + stride)
        windows.append((max(0, end - context), end, done))
        done = end
    return windows


@torch.inference_mode()
def _nats(model: nn.Module, tokens: Tensor, windows: list[tuple[int, int, int]], device) -> float:
    width = max(end - begin for begin, end, _ in windows)
    inputs = torch.zeros(len(windows), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for row, (begin, end, first) in enumerate(windows):
        inputs[row, : end - begin] = tokens[begin:end]
        targets[row, first - begin : end - begin] = tokens[first + 1 : end + 1]
    hidden, targets = model.hidden(inputs.to(device)), targets.to(device)
    nats = 0.0
    for h, t in zip(hidden, targets):  # one window's logits at a time
        chosen = t != IGNORE
        losses = F.cross_entropy(model.lm_head(h[chosen]).float(), t[chosen], reduction="none")
        nats += losses.double().sum().item()
    return nats
