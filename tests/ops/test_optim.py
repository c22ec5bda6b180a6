"""llmkern.optim.AdamW is torch.optim.AdamW: numbers over many steps, and one state_dict for both."""

from copy import deepcopy

import pytest
import torch

import llmkern
from llmkern.ops import adamw, grad_norm
from llmkern.ops.dispatch import record
from llmkern.ops.optim_state import dequantize_state, magnitudes, quantize_state
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
    assert calls
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


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping(max_norm: float):
    """As clip_grad_norm_ before torch's step, over all groups, and the gradients stay as they are."""
    torch.manual_seed(0)
    ours = [torch.randn(s).requires_grad_() for s in SHAPES]
    theirs = [p.detach().double().requires_grad_() for p in ours]
    groups = [[{"params": many[:1], "weight_decay": 0.0}, {"params": many[1:]}] for many in (ours, theirs)]
    optimizer, exact = AdamW(groups[0], max_norm=max_norm), torch.optim.AdamW(groups[1])
    for _ in range(20):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.double()
        before = [p.grad.clone() for p in ours]
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        exact.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)


def small_steps(**options) -> torch.Tensor:
    """bfloat16 parameters of 1 after 100 steps of 1e-4 each, far less than their precision of 2⁻⁸."""
    torch.manual_seed(0)
    p = torch.ones(10000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, **options)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.detach().float()


def test_small_steps_are_lost_without_help():
    assert (small_steps() == 1).all()
    assert (small_steps(master_weights=True) == torch.tensor(0.99).bfloat16()).all()
    rounded = small_steps(stochastic_rounding=True)
    assert rounded.mean().item() == pytest.approx(0.99, abs=1e-4) and rounded.unique().numel() > 1


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding", "states_8bit"])
def test_resumed_bit_for_bit(option: str):
    def steps(p, optimizer, first, last):
        for step in range(first, last):
            p.grad = torch.full_like(p, (-1.0) ** step + 0.3)
            optimizer.step()

    torch.manual_seed(1)
    whole = torch.randn(5000).bfloat16().requires_grad_()
    optimizer = AdamW([whole], **{option: True})
    steps(whole, optimizer, 0, 5)
    state, random, half = deepcopy(optimizer.state_dict()), torch.get_rng_state(), whole.detach().clone()
    steps(whole, optimizer, 5, 9)
    resumed = half.requires_grad_()
    optimizer = AdamW([resumed], **{option: True})
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    steps(resumed, optimizer, 5, 9)
    assert torch.equal(resumed, whole)
    coded = option == "states_8bit"
    assert optimizer.state[resumed]["exp_avg"].dtype == (torch.uint8 if coded else torch.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_hold_what_they_say(signed: bool):
    """The largest of a block is exact, every code survives, and no element is wrong by more than its step."""
    torch.manual_seed(0)
    x = torch.randn(2048, dtype=torch.float64) * torch.logspace(-7, 0, 2048, dtype=torch.float64)
    x = x if signed else x.abs()
    codes, scales = quantize_state(x, signed)
    share, wrong = (
        t.view(8, 256).abs() / scales[:, None] for t in (x, dequantize_state(codes, scales, signed) - x)
    )
    assert (wrong[share == 1] == 0).all() and (share == 1).sum() == 8
    half_step = 0.45 / (64 if signed else 128)  # in the largest decade; a decade below it is a fifth of that
    for least in (0.1, 0.01, 0.001):
        assert wrong[(share > least) & (share <= 10 * least)].max() < 1.01 * half_step
        half_step /= 5
    every = torch.tensor(magnitudes(7 if signed else 8), dtype=torch.float64)
    again, one = quantize_state(every, signed)
    assert torch.equal(again.long(), torch.arange(len(every))) and one == 1
    assert signed or (quantize_state(torch.tensor([1.0, 1e-30]), False)[0] > 0).all()


def test_8_bits_on_every_backend(backend: str, device: str):
    """The same codes as the reference, and NaN stays in its block."""
    torch.manual_seed(0)
    p, g = torch.randn(3000, device=device), torch.randn(3000, device=device)
    g[700] = torch.nan
    results = []
    for name in (backend, "reference"):
        value = p.clone()
        moments = [quantize_state(torch.zeros(3000, device=device), signed) for signed in (True, False)]
        (m, m_scale), (v, v_scale) = moments
        with llmkern.use(name):
            for step in (1, 2, 3):
                adamw([value], [g], [m], [v], step, exp_avg_scales=[m_scale], exp_avg_sq_scales=[v_scale])
        results.append((value, m, v, m_scale))
    for got, expected in zip(*results):
        differ = (got.float() - expected.float()).abs() > 1e-6
        assert differ.sum() <= 3  # a last bit may decide between two codes
    assert results[0][3].isnan().nonzero().tolist() == [[2]] and not results[0][0][768:].isnan().any()


def test_8_bits_go_over():
    """States are converted when optimizers of different kinds load each other's; small ones stay numbers."""

    def optimizer(**options):
        torch.manual_seed(0)
        params = [torch.randn(70, 60).requires_grad_(), torch.randn(60).requires_grad_()]
        for p in params:
            p.grad = torch.randn(p.shape)
        made = AdamW(params, **options)
        made.step()
        return made, params

    (coded, params), (plain, _) = optimizer(states_8bit=True), optimizer()
    assert [coded.state[p]["exp_avg"].dtype for p in params] == [torch.uint8, torch.float32]
    assert coded.state[params[0]]["exp_avg_sq_scale"].shape == (17,)
    numbers = {name: plain.state_dict()["state"][0][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    plain.load_state_dict(coded.state_dict())
    for name, was in numbers.items():
        got = plain.state_dict()["state"][0][name]
        torch.testing.assert_close(got, was, rtol=0, atol=0.0071 * was.abs().max().item())
    coded.load_state_dict(plain.state_dict())
    assert coded.state[params[0]]["exp_avg"].dtype == torch.uint8
    nbytes = sum(t.nbytes for name, t in coded.state[params[0]].items() if name != "step")
    assert nbytes == 2 * (70 * 60 + 17 * 4)


def test_8_bits_converge():
    """Least squares with gradients of very different sizes: as low a loss as with float32 states."""

    def final(**options) -> float:
        torch.manual_seed(0)
        x = torch.randn(256, 64) * torch.logspace(-1, 0, 64)
        y = x @ torch.randn(64, 80)
        w = torch.zeros(64, 80, requires_grad=True)
        optimizer = AdamW([w], lr=0.05, weight_decay=0.0, **options)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            optimizer.zero_grad()
            loss = (x @ w - y).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    exact = final()
    assert exact < 0.001 and final(states_8bit=True) < 1.05 * exact


def test_random_rounding_on_every_backend(backend: str, device: str):
    """The same bits as the reference; infinities and NaN stay what they are."""
    torch.manual_seed(0)
    p = torch.randn(1000, device=device).bfloat16()
    p[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    results = []
    for name in (backend, "reference"):
        value, m, v = p.clone(), torch.zeros(1000, device=device), torch.zeros(1000, device=device)
        with llmkern.use(name):
            adamw([value], [torch.ones_like(p)], [m], [v], 1, seed=torch.tensor(2**50 + 1, device=device))
        results.append(value)
    differ = (results[0] != results[1]) & ~p.isnan()
    assert differ.sum() <= 2  # a last bit of the float32 value may carry
    assert results[0][:2].isinf().all() and results[0][2].isnan()


def test_one_sentence():
    with pytest.raises(ValueError, match="max_norm is 0, expected a positive number"):
        AdamW([torch.ones(2)], max_norm=0)
    with pytest.raises(ValueError, match="master_weights and stochastic_rounding are both True"):
        AdamW([torch.ones(2)], master_weights=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match="states_8bit and amsgrad are both True"):
        AdamW([torch.ones(2)], amsgrad=True, states_8bit=True)
    codes = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="exp_avg_scales has 0 tensors, expected 1"):
        adamw([torch.ones(2)], [torch.ones(2)], [codes], [codes], 1)
    with pytest.raises(ValueError, match="grads is empty"):
        grad_norm([])
    with pytest.raises(ValueError, match="tensors are on cpu, meta, expected one device"):
        grad_norm([torch.ones(2), torch.ones(2, device="meta")])
    t = torch.ones(2)
    with pytest.raises(ValueError, match="grads has 0 tensors, expected 1"):
        adamw([t], [], [t], [t], 1)
    with pytest.raises(ValueError, match="step is 0"):
        adamw([t], [t], [t], [t], 0)


def test_what_torch_computes_is_said():
    p = torch.nn.Parameter(torch.ones(3, 2).t())  # not contiguous
    p.grad = torch.ones(2, 3)
    optimizer, seen = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])  # from now on torch's step has hooks of its own
    llmkern.set_fallback("error")
    with pytest.raises(llmkern.ops.FallbackError, match="not contiguous"):
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
