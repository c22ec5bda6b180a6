"""Embedding: torch's results, a gradient with the same bits always, padding, options, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from guard_pages import guarded
from torch import nn

import llmkern
from llmkern import ops
from llmkern.nn import Embedding


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_gradient_of_a_row_is_summed_in_float32(backend: str, device: str, strict):
    """256 tokens of one row, 1 + 2^-7 each: a sum kept in bfloat16 would stop at 256."""
    weight = torch.zeros(3, 40, dtype=torch.bfloat16, device=device, requires_grad=True)
    idx = torch.full((256,), 1, device=device)
    with ops.use(backend):
        y = ops.embedding(idx, weight)
        y.backward(torch.full_like(y, 1 + 2**-7))
    assert (weight.grad[1] == 258).all() and not weight.grad[[0, 2]].any()


def test_sum_is_rounded_once(backend: str, device: str, strict):
    weight = randn(5, 9, dtype=torch.bfloat16).to(device)
    positions = randn(2, 9, dtype=torch.bfloat16).to(device)
    idx = torch.tensor([[0, 4], [2, 2]], device=device)
    with ops.use(backend):
        y = ops.embedding(idx, weight, positions)
    assert torch.equal(y, (weight.float()[idx] + positions.float()).bfloat16())


def test_many_tokens_equal_torch(backend: str, device: str, strict):
    if backend == "triton" and device == "cpu":
        pytest.skip("minutes in the interpreter")
    weight = randn(97, 33).to(device).requires_grad_()
    idx = torch.randint(97, (3, 1000), generator=torch.Generator().manual_seed(1)).to(device)
    dy = randn(3, 1000, 33).to(device)
    with ops.use(backend):
        (ours,) = torch.autograd.grad(ops.embedding(idx, weight, padding_idx=7), weight, dy)
    exact = weight.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(F.embedding(idx, exact, padding_idx=7), exact, dy.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("index", [4, -1, 2**40])
def test_index_out_of_range(implementation: str, index: int):
    idx, fine = torch.tensor([0, index]), torch.tensor([0, 1])
    words = rf"{index} is out of range, expected 0 to 3"
    with ops.use(implementation):
        with pytest.raises(IndexError, match=f"index {words}"):
            ops.embedding(idx, randn(4, 8))
        with pytest.raises(IndexError, match=f"position {words}"):
            ops.embedding(fine, randn(4, 8), randn(4, 8), idx)


def test_index_out_of_range_is_nan_on_gpus():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = randn(4, 8).to(device).requires_grad_()
    with ops.use("triton"):
        y = ops.embedding(torch.tensor([0, 4, -1], device=device), weight)
        y[0].sum().backward()
    assert y[1:].isnan().all() and not y[0].isnan().any()
    assert (weight.grad[0] == 1).all() and (weight.grad[1:] == 0).all()


@pytest.mark.parametrize("side", ["start", "end"])
def test_no_read_or_write_outside(backend: str, device: str, side: str, strict):
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")
    for dtype in (torch.float32, torch.bfloat16):
        weight, positions = (guarded(randn(n, 17, dtype=dtype), side).requires_grad_() for n in (4, 3))
        idx = guarded(torch.tensor([3, 0, 3]), side)
        with ops.use(backend):
            ops.embedding(idx, weight, positions).sum().backward()


def test_nan_stays_in_its_row(backend: str, device: str, strict):
    weight = randn(4, 8).to(device)
    weight[2, 5] = math.nan
    with ops.use(backend):
        y = ops.embedding(torch.tensor([2, 1, 2], device=device), weight, randn(3, 8).to(device))
    assert y.isnan().nonzero().tolist() == [[0, 5], [2, 5]]


def test_module_is_torch_s(strict):
    ours, theirs = Embedding(9, 4, padding_idx=2), nn.Embedding(9, 4, padding_idx=2)
    theirs.load_state_dict(ours.state_dict())
    idx = torch.tensor([[2, 8, 0]])
    for module in (ours, theirs):
        module(idx).square().sum().backward()
    assert torch.equal(ours(idx), theirs(idx)) and torch.equal(ours.weight.grad, theirs.weight.grad)
    assert ours(idx, randn(3, 4)).shape == (1, 3, 4)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_options_go_to_torch(option: dict):
    module = Embedding(9, 4, **option)
    llmkern.set_fallback("warn")
    with pytest.warns(ops.FallbackWarning, match=f"it has the option {next(iter(option))}"):
        module(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="position_weight cannot be added"):
        module(torch.tensor([1, 2]), randn(2, 4))


IDX, W = torch.tensor([[0, 1, 2]]), torch.ones(4, 8)
BAD = [
    (lambda: ops.embedding(IDX, W[0]), "weight has shape (8,)"),
    (lambda: ops.embedding(IDX, W.long()), "weight is torch.int64"),
    (lambda: ops.embedding(IDX.float(), W), "idx is torch.float32"),
    (lambda: ops.embedding(IDX, W, W[:, :3]), "position_weight has shape (4, 3)"),
    (lambda: ops.embedding(IDX, W, W.half()), "position_weight is torch.float16"),
    (lambda: ops.embedding(IDX, W, W, torch.arange(2)), "position_ids has shape (2,)"),
    (lambda: ops.embedding(IDX, W, None, IDX), "position_ids is given without position_weight"),
    (lambda: ops.embedding(IDX, W, padding_idx=4), "padding_idx is 4"),
    (lambda: ops.embedding(IDX, W[:0]), "weight has no rows"),
    (lambda: ops.embedding(IDX.to("meta"), W), "idx is on meta"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and len(message) < 200


def test_positions_of_sequences_of_one_token(backend: str, device: str):
    """Their expanded position ids flatten to a view whose elements share one address."""
    tables = torch.arange(8.0, device=device).view(4, 2), torch.arange(6.0, device=device).view(3, 2)
    idx = torch.tensor([[1], [3], [0]], device=device)
    with ops.use(backend):
        y = ops.embedding(idx, *tables)
    assert torch.equal(y, tables[0][idx] + tables[1][0])
