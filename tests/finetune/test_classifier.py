"""A head on a model: padding, pooling, weights of classes, checkpoints."""

import pytest
import torch

from llmkern import models
from llmkern.models import GPT, Classifier, ClassifierConfig, GPTConfig, Llama, LlamaConfig
from llmkern.text import CharTokenizer
from llmkern.train import checkpoint

TEXTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8], [9, 7, 9, 3]]


def _bases():
    torch.manual_seed(0)
    yield GPT(GPTConfig(11, 16, 2, 2, 32))
    yield Llama(LlamaConfig(11, 32, 48, 2, 4, 2, max_position_embeddings=16))
    if hasattr(models, "BERT"):
        yield models.BERT(models.BERTConfig(11, 16, 2, 2, 32))


def _padded(texts):
    width = max(map(len, texts))
    return torch.tensor([text + [-1] * (width - len(text)) for text in texts])


def test_padding_is_not_seen():
    for base in _bases():
        model = Classifier.on(base, ("a", "b", "c")).eval()
        together = model(_padded(TEXTS))[0]
        alone = torch.cat([model(torch.tensor([text]))[0] for text in TEXTS])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert together.shape == (4, 3) and together.std(0).min() > 0


def test_loss_and_class_weights():
    model = Classifier.on(next(_bases()), ("a", "b")).eval()
    targets = torch.tensor([0, 1, 1, 0])
    logits, loss = model(_padded(TEXTS), targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    model.class_weights = torch.tensor([1.0, 0.0])
    only_a = torch.nn.functional.cross_entropy(logits[[0, 3]], targets[[0, 3]])
    torch.testing.assert_close(model(_padded(TEXTS), targets)[1], only_a)
    assert "class_weights" not in model.state_dict()


def test_checkpoint(tmp_path):
    for i, base in enumerate(_bases()):
        model = Classifier.on(base, ("a", "b")).eval()
        checkpoint.save(tmp_path / str(i), 1, model, CharTokenizer("abcdefghijk"))
        again = checkpoint.load(tmp_path / str(i)).build_model()
        assert again.config == model.config and type(again.base) is type(base)
        assert torch.equal(again(_padded(TEXTS))[0], model(_padded(TEXTS))[0])


def test_refuses():
    model = Classifier.on(next(_bases()), ("a", "b"))
    with pytest.raises(ValueError, match="a text has no tokens"):
        model(torch.tensor([[1, 2], [-1, -1]]))
    with pytest.raises(ValueError, match="expected at least 2, all different"):
        ClassifierConfig(model.config.base, ("a", "a"))
