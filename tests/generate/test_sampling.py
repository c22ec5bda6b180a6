"""Which token comes next."""

import pytest
import torch

from llmkern.errors import UserError
from llmkern.generate import GREEDY, Sampling
from llmkern.generate.sampling import uniform

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def _counts(sampling, logits=LOGITS, draws=4000):
    """How often each token comes, over many seeds at once."""
    tokens = sampling.choose(logits.expand(draws, -1), [[]] * draws, range(draws))
    return torch.bincount(tokens, minlength=len(logits)) / draws


def test_the_distribution_as_it_is():
    assert torch.allclose(_counts(Sampling()), LOGITS.exp(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"min_p": 0.2}, [0.5, 0.3, 0.15, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0.5, 0.3, 0, 0]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"temperature": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
)
def test_cuts(options, left):
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):  # tokens in any order
        p = torch.tensor(left)[order]
        counts = _counts(Sampling(**options), LOGITS[order])
        assert torch.allclose(counts, p / p.sum(), atol=0.03)
        assert not counts[p == 0].any()


def test_same_cuts_as_hugging_face():
    transformers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    texts = torch.randint(40, (5, 12), generator=torch.Generator().manual_seed(1))
    steps = (
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.1),
    )
    theirs = logits
    for step in steps:
        theirs = step(texts, theirs)
    sampling = Sampling(1.3, 0.7, 20, 0.8, 0.1)
    scores, tokens = sampling._sorted(sampling._penalised(logits, texts.tolist()) / 0.7)
    p = sampling._cut(scores.double().softmax(-1))
    ours = torch.zeros(5, 40, dtype=torch.float64).scatter(1, tokens, p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(ours, theirs.double().softmax(-1), rtol=1e-5, atol=1e-9)


def test_repetition_penalty():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    choose = Sampling(repetition_penalty=2.0, temperature=0).choose
    assert choose(logits, [[]], [0]).tolist() == [0]
    assert choose(logits, [[0, 0]], [0]).tolist() == [1]  # 1.0 < 1.5: once, however often it is there
    assert choose(logits[:, 2:], [[0]], [0]).tolist() == [1]  # -2.0 < -1.2
    assert logits.tolist() == [[2.0, 1.5, -1.0, pytest.approx(-1.2)]]


def test_draws_belong_to_seed_and_place():
    draws = {uniform(seed, place) for seed in range(50) for place in range(50)}
    assert len(draws) == 2500 and all(0 <= u < 1 for u in draws)
    assert uniform(7, 3) == uniform(7, 3)
    alone = Sampling().choose(LOGITS[None], [[5, 5]], [9])
    together = Sampling().choose(LOGITS.expand(3, -1), [[1], [5, 5], []], [4, 9, 9])
    assert alone[0] == together[1]


def test_greedy_draws_nothing():
    assert GREEDY.choose(torch.tensor([[0.0, 1.0], [3.0, 1.0]]), [[], []], [0, 0]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0, and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(UserError, match=match):
        Sampling(**options)
