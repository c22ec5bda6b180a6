"""Which tokens a step sees: epochs, ranks, shards on a disk, and masked places."""

import numpy as np
import pytest
import torch

from llmkern.text.batches import Batches
from llmkern.text.masking import IGNORE, MaskedBatches
from llmkern.text.shards import Tokens

TOKENS = torch.arange(1025)
MASK, END = 5000, 7  # END is a special token of the text


def _starts(batches, steps):
    return np.concatenate([batches.starts(step) for step in steps])


def test_an_epoch_has_every_window_once():
    """Side by side, in another order and from another start each time."""
    batches = Batches(TOKENS, 4, 25, seed=1, order="epochs")  # 40 windows are 10 steps
    epochs = [_starts(batches, range(10 * e, 10 * e + 10)) for e in range(30)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + 1000, 25))
        assert list(starts) != sorted(starts)
    assert len({min(starts) for starts in epochs}) > 10 and len({tuple(np.argsort(s)) for s in epochs}) == 30
    inputs, targets = batches[3]
    assert torch.equal(targets, inputs + 1) and inputs[:, 0].tolist() == batches.starts(3).tolist()


def test_a_batch_may_lie_in_two_epochs():
    batches = Batches(TOKENS, 3, 25, seed=1, order="epochs")
    in_order = _starts(batches, range(30))
    alone = [Batches(TOKENS, 3, 25, seed=1, order="epochs").starts(step) for step in range(30)]
    assert in_order.tolist() == np.concatenate(alone).tolist()
    assert all(len(set(in_order[i : i + 40].tolist())) == 40 for i in (0, 40))


@pytest.mark.parametrize("order", ["epochs", "random"])
def test_ranks_share_the_batch_of_one_process(order):
    whole = Batches(TOKENS, 6, 25, seed=2, order=order)
    parts = [Batches(TOKENS, 2, 25, seed=2, order=order, rank=r, world=3) for r in range(3)]
    for step in (0, 5, 9):
        assert np.concatenate([part.starts(step) for part in parts]).tolist() == whole.starts(step).tolist()


def test_windows_go_on_in_the_next_shard():
    pieces = np.split(np.arange(50), [20, 20, 23])  # the second is empty
    found = Tokens(pieces).windows(np.array([0, 10, 19, 20, 22, 38]), 12)
    assert found.tolist() == [list(range(s, s + 12)) for s in (0, 10, 19, 20, 22, 38)]


def _masked(share=0.15, special=(), length=400, steps=40):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(50, size=5000))
    batches = Batches(tokens, 4, length, seed=3)
    masked = MaskedBatches(batches, MASK, 50, share, special)
    found = [masked[step] for step in range(steps)]
    plain = torch.stack([tokens[s : s + length] for s in _starts(masked, range(steps)).tolist()])
    inputs, targets = (torch.cat(parts) for parts in zip(*found))
    return plain, inputs, targets, masked


def test_masked_places():
    """The same share of every window: 80 % hidden, 10 % a random token, 10 % as they were."""
    plain, inputs, targets, masked = _masked()
    chosen = targets != IGNORE
    assert set(chosen.sum(1).tolist()) == {60}  # 15 % of 400
    assert torch.equal(targets[chosen], plain[chosen]) and torch.equal(inputs[~chosen], plain[~chosen])
    hidden, same = inputs[chosen] == MASK, inputs[chosen] == plain[chosen]
    shares = [t.double().mean().item() for t in (hidden, same, ~hidden & ~same)]
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 50, 0.1 - 0.1 / 50], abs=0.015)
    assert inputs[chosen & (inputs != MASK)].max() < 50
    assert all(torch.equal(a, b) for a, b in zip(masked[3], masked[3]))
    assert not torch.equal(masked[0][1] == IGNORE, masked[1][1] == IGNORE)


def test_special_tokens_are_never_masked():
    for share in (0.15, 1.0):
        plain, inputs, targets, _ = _masked(share, (END,), steps=4)
        assert (plain == END).any() and (inputs[plain == END] == END).all()
        assert (targets[plain == END] == IGNORE).all()
        assert share < 1 or (targets[plain != END] != IGNORE).all()


def test_ranks_mask_other_places():
    tokens = torch.zeros(500, dtype=torch.int64)
    batches = (Batches(tokens, 2, 100, rank=rank, world=2) for rank in (0, 1))
    first, second = (MaskedBatches(each, MASK, 50)[0][1] for each in batches)
    assert not torch.equal(first, second)
