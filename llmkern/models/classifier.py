"""A head on any of our models that tells to which class a text belongs."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import KINDS, build, describe
from .causal import CausalLM

PADDING = -1  # behind the tokens of shorter texts, as `llmkern.text.labelled` puts it


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is made of.

    Attributes:
        base: the model below the head, as `describe` tells it.
        labels: names of the classes.
    """

    base: dict[str, Any]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))  # JSON has lists
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"Classifier: labels are {self.labels}, expected at least 2, all different")

    @property
    def vocab_size(self) -> int:
        return self.base["config"]["vocab_size"]


class Classifier(nn.Module):
    """The hidden state of a text, through a linear, to scores of classes.

    The state of a causal model is that of the last token, the only one that saw all others (Radford et al.
    2018, Improving language understanding by generative pre-training, sec. 3.2); that of an encoder the mean.

    Args:
        config: its base and labels.
        kernels: as `GPT`'s.

    Attributes:
        base: the model.
        score: Linear from its width to the number of classes.
        class_weights: (K,) by which the losses of each class are multiplied, or None.
    """

    def __init__(self, config: ClassifierConfig, kernels: bool = True) -> None:
        super().__init__()
        self.config = config
        self.base = build(config.base, kernels)
        self.score = nn.Linear(self.base.lm_head.in_features, len(config.labels), bias=False)
        self.register_buffer("class_weights", None, persistent=False)
        nn.init.normal_(self.score.weight, std=0.02)

    @classmethod
    def on(cls, base: nn.Module, labels: tuple[str, ...]) -> "Classifier":
        """A classifier around a model that is there already, and stays the same object."""
        config = ClassifierConfig(describe(base), labels)
        with torch.device("meta"):
            self = cls(config)
        self.base = base
        weight = next(base.parameters())
        self.score = nn.Linear(base.lm_head.in_features, len(labels), bias=False).to(weight)
        nn.init.normal_(self.score.weight, std=0.02)
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores of the classes, and their loss.

        Args:
            tokens: (B, T) token ids, with -1 behind texts of fewer than T.
            targets: (B,) classes.

        Returns:
            (logits, loss): (B, K), and the cross-entropy in nats, weighted by class_weights, or None
            without targets.

        Raises:
            ValueError: a text without tokens.
        """
        there = tokens != PADDING  # (B, T)
        lengths = there.sum(1)
        if not lengths.all():
            raise ValueError("Classifier: a text has no tokens, expected at least one")
        logits = self.score(self._pooled(tokens.clamp(min=0), there, lengths)).float()  # (B, K)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits, targets, self.class_weights)

    def _pooled(self, tokens: Tensor, there: Tensor, lengths: Tensor) -> Tensor:
        """(B, C); what stands behind a text is not seen by it."""
        if isinstance(self.base, CausalLM):
            rows = torch.arange(len(tokens), device=tokens.device)
            return self.base.hidden(tokens)[rows, lengths - 1]
        x = self.base.hidden(tokens, padding_mask=~there)
        return (x * there[:, :, None]).sum(1) / lengths[:, None]

    @property
    def block_size(self) -> int:
        """The longest text, in tokens."""
        return self.base.config.block_size

    def num_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


KINDS["Classifier"] = (Classifier, ClassifierConfig)
