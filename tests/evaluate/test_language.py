"""Loss, perplexity and bits per byte of a text."""

import math

import pytest
import torch

from llmkern.errors import UserError
from llmkern.evaluate import Predictability, predictability
from llmkern.models import GPT, GPTConfig

TOKENS = torch.randint(17, (53,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(17, 8, 1, 2, 32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@torch.no_grad()
def _one_by_one(model, tokens, stride):
    """-log p of each token after the first, from the window that predicts it."""
    total, end = 0.0, 8
    for i in range(1, len(tokens)):
        while i > end:
            end += stride
        begin = max(0, min(end, len(tokens) - 1) - 8)
        logits = model(tokens[None, begin:i])[0][0, -1]
        total -= logits.double().log_softmax(-1)[tokens[i]].item()
    return total


@pytest.mark.parametrize("stride", [8, 3, 1])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 53])
def test_every_token_once(model, stride, length):
    result = predictability(model, TOKENS[:length], stride, batch_size=3)
    assert result.tokens == length - 1
    assert result.nats == pytest.approx(_one_by_one(model, TOKENS[:length], stride), rel=1e-5)


def test_measures():
    result = Predictability(nats=20 * math.log(4), tokens=20, bytes=50)
    assert result.loss == pytest.approx(math.log(4))
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(20 * 2 / 50)
    assert Predictability(1e6, 1).perplexity == math.inf
    assert Predictability(1.0, 1).bits_per_byte is None


def test_batches_and_mode_do_not_matter(model):
    expected = predictability(model, TOKENS).nats
    assert predictability(model, TOKENS, batch_size=1).nats == pytest.approx(expected, rel=1e-6)
    model.train()
    predictability(model, TOKENS)
    assert model.training
    model.eval()


def test_refuses(model):
    for tokens, stride, match in (
        (TOKENS[:1], None, "the text has 1 tokens, expected at least 2"),
        (TOKENS, 0, "stride is 0, expected 1 to the context, 8"),
        (TOKENS, 9, "stride is 9"),
    ):
        with pytest.raises(UserError, match=match):
            predictability(model, tokens, stride)
