"""How well texts are classified: the confusion matrix, and what follows from it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..models import Classifier
from ..text.labelled import Examples


class Scores(NamedTuple):
    """What a classifier did with examples of K classes.

    Attributes:
        confusion: (K, K) counts; row is the true class, column the predicted one.
        loss: mean cross-entropy in nats, not weighted.
        labels: names of the classes.
    """

    confusion: np.ndarray
    loss: float
    labels: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The share of texts whose class was found."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def precision(self) -> np.ndarray:
        """(K,) of the texts given to each class, the share that belongs there; 0 where none was."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(0))

    @property
    def recall(self) -> np.ndarray:
        """(K,) of the texts of each class, the share that was found; 0 where there is none."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(1))

    @property
    def f1(self) -> np.ndarray:
        """(K,) 2 TP / (2 TP + FP + FN); 0 for a class that is neither there nor predicted."""
        return _ratio(2 * self.confusion.diagonal(), self.confusion.sum(0) + self.confusion.sum(1))

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that are there or were predicted, as scikit-learn has it."""
        seen = self.confusion.sum(0) + self.confusion.sum(1) > 0
        return float(self.f1[seen].mean())

    def summary(self) -> dict:
        """All of it as plain values."""
        by_class = {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "texts": int(n)}
            for label, p, r, f, n in zip(
                self.labels, self.precision, self.recall, self.f1, self.confusion.sum(1)
            )
        }
        return {
            "texts": int(self.confusion.sum()),
            "loss": self.loss,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "classes": by_class,
            "confusion": self.confusion.tolist(),
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def score(model: Classifier, examples: Examples, batch_size: int = 32) -> Scores:
    """Classify every example; the model's mode is as before afterwards."""
    labels = model.config.labels
    logits = predict(model, examples, batch_size)
    truth = torch.from_numpy(examples.classes)
    loss = torch.nn.functional.cross_entropy(logits, truth).item()
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (examples.classes, logits.argmax(1).numpy()), 1)
    return Scores(confusion, loss, tuple(labels))


@torch.no_grad()
def predict(model: Classifier, examples: Examples, batch_size: int = 32) -> torch.Tensor:
    """(n, K) logits, on the CPU; texts of like lengths run together."""
    training, device = model.training, next(model.parameters()).device
    order = np.argsort([len(t) for t in examples.tokens], kind="stable").tolist()
    logits = torch.empty(len(examples), len(model.config.labels))
    model.eval()
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        logits[index] = model(examples.batch(index, device)[0])[0].cpu()
    model.train(training)
    return logits


def majority(classes: Sequence[int]) -> float:
    """The accuracy of always naming the most frequent class."""
    return float(np.bincount(classes).max() / len(classes))
