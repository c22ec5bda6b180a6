"""llmkern.optim.AdamW is torch.optim.AdamW: numbers over many steps, and one state_dict for both."""

from copy import deepcopy

import pytest
import torch

import llmkern
from llmkern.ops import adamw
from llmkern.ops.dispatch import record
from llmkern.optim import AdamW

SHAPES = (3, 5), (33,), (17, 64)


def train(cls, steps: int, dtype=torch.float32, state=None, start=None, **options):
    """Parameters and optimizer after some steps; the last parameter has a gradient in odd steps only."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]
    if start is not None:
        params = [p.detach().to(dtype).clone().requires_grad_() for p in start]
    optimizer = cls(params, lr=1e-2, weight_decay=0.1, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(dtype)
            p.grad = None if i == 2 and step % 2 else grad
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}])
def test_100_steps(options: dict):
    exact, _ = train(torch.optim.AdamW, 100, torch.float64, **options)
    with record() as calls:
        got, _ = train(AdamW, 100, **options)
    assert bool(calls) is not bool(options)
    for a, b in zip(got, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_state_dict_goes_over(classes: tuple):
    params, optimizer = train(classes[0], 5)
    ends = [
        train(c, 5, state=deepcopy(optimizer.state_dict()), start=params)[0] for c in (classes[1], classes[0])
    ]
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_closure():
    p = torch.ones(3, requires_grad=True)
    optimizer = AdamW([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (p < 1).all()


def test_one_sentence():
    t = torch.ones(2)
    with pytest.raises(ValueError, match="grads has 0 tensors, expected 1"):
        adamw([t], [], [t], [t], 1)
    with pytest.raises(ValueError, match="step is 0"):
        adamw([t], [t], [t], [t], 0)


def test_what_torch_computes_is_said():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer, seen = AdamW([p], amsgrad=True), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])  # from now on torch's step has hooks of its own
    llmkern.set_fallback("error")
    with pytest.raises(llmkern.ops.FallbackError, match="amsgrad=True"):
        optimizer.step()
    llmkern.set_fallback("silent")
    seen.clear()
    optimizer.step()
    assert seen == ["pre"] and (p < 1).all()
    llmkern.set_fallback("warn")


def test_a_parameter_that_backward_needs_is_known_to_have_changed():
    p = torch.nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
