"""Measures of classification, against what their formulas give."""

import numpy as np
import pytest
import torch

from llmkern.evaluate import Scores, predict, score
from llmkern.evaluate.classes import majority
from llmkern.models import GPT, Classifier, GPTConfig
from llmkern.text.labelled import Examples

# class c is neither there nor found, but has a row
CONFUSION = np.array([[5, 1, 0, 0], [2, 3, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
SCORES = Scores(CONFUSION, 0.5, ("a", "b", "c", "d"))


def test_by_hand():
    assert SCORES.accuracy == pytest.approx(8 / 13)
    assert SCORES.precision == pytest.approx([5 / 8, 3 / 4, 0, 0])
    assert SCORES.recall == pytest.approx([5 / 6, 3 / 6, 0, 0])
    assert SCORES.f1 == pytest.approx([10 / 14, 6 / 10, 0, 0])
    assert SCORES.macro_f1 == pytest.approx((10 / 14 + 6 / 10) / 4)
    assert SCORES.summary()["classes"]["b"] == {
        "precision": 0.75, "recall": 0.5, "f1": pytest.approx(0.6), "texts": 6
    }  # fmt: skip


def test_as_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, found = (np.repeat(x, CONFUSION.ravel()) for x in np.indices((4, 4)).reshape(2, -1))
    assert SCORES.accuracy == pytest.approx(metrics.accuracy_score(truth, found))
    assert SCORES.macro_f1 == pytest.approx(metrics.f1_score(truth, found, average="macro"))
    assert (metrics.confusion_matrix(truth, found) == CONFUSION).all()


def test_a_class_that_is_nowhere_does_not_count():
    scores = Scores(np.array([[4, 0, 0], [0, 2, 0], [0, 0, 0]]), 0.0, ("a", "b", "c"))
    assert scores.macro_f1 == scores.accuracy == 1


def test_score():
    torch.manual_seed(0)
    model = Classifier.on(GPT(GPTConfig(11, 16, 1, 2, 32)), ("a", "b", "c")).train()
    random = np.random.default_rng(0)
    tokens = [random.integers(11, size=n) for n in random.integers(1, 16, size=20)]
    examples = Examples(tokens, random.integers(3, size=20))
    logits = predict(model, examples, batch_size=3)
    assert model.training
    model.eval()
    for row, text in zip(logits, tokens):  # each where it belongs, though lengths were sorted
        torch.testing.assert_close(row, model(torch.from_numpy(text)[None])[0][0], rtol=1e-4, atol=1e-5)
    scores = score(model, examples, batch_size=7)
    found = logits.argmax(1).numpy()
    assert scores.accuracy == (found == examples.classes).mean()
    for i, j in np.ndindex(3, 3):
        assert scores.confusion[i, j] == ((examples.classes == i) & (found == j)).sum()
    truth = torch.from_numpy(examples.classes)
    assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)
    assert majority([0, 1, 1, 2]) == 0.5


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from llmkern.plots import confusion

    confusion(tmp_path / "c.png", CONFUSION.tolist(), SCORES.labels, "title")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
