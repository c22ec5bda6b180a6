"""ffn: what is dropped, what is kept, and how much memory the hidden activations take."""

import pytest
import torch

from llmkern import _cpu, ops
from llmkern.ops.ffn import OUTPUT_ROWS, _factors

pytestmark = pytest.mark.usefixtures("strict")
SEED = torch.tensor(2**61 + 12345)


def layer(n=70, d=48, f=96, dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    shapes = (n, d), (f, d), (f,), (d, f), (d,)
    return [(torch.randn(s, generator=make) * s[-1] ** -0.5).to(dtype) for s in shapes]


def test_the_same_places_on_every_backend(backend: str, device: str):
    """The zeros of an output whose dropout has this seed, and the factor of the rest."""
    tensors = [t.to(device) for t in layer()]
    y = ops.ffn(*tensors)
    with ops.use(backend):
        dropped = ops.ffn(*tensors, output_dropout_p=0.4, dropout_seed=SEED)
    factors = _factors(y.cpu(), SEED, 0.4, OUTPUT_ROWS).to(device)
    assert torch.equal(dropped == 0, factors == 0)
    torch.testing.assert_close(dropped, y * factors, rtol=1e-5, atol=1e-6)


def test_keep_rate_and_seeds():
    x = torch.ones(500, 8)
    eye, wide = torch.eye(8), torch.ones(400, 8)
    out = torch.eye(400)
    for p in (0.1, 0.5, 0.9):
        torch.manual_seed(1)
        y, again = (ops.ffn(x, wide, None, out, None, "relu", dropout_p=p) for _ in range(2))
        assert not torch.equal(y, again)  # a new seed for each call
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.005)
        assert y.mean().item() == pytest.approx(8, rel=0.02)
    torch.manual_seed(1)
    first = ops.ffn(x, eye, None, eye, None, "relu", output_dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, ops.ffn(x, eye, None, eye, None, "relu", output_dropout_p=0.5))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_or_everything_dropped(backend: str, device: str, p: float):
    tensors = [t.to(device).requires_grad_() for t in layer()]
    residual = torch.randn(70, 48, device=device)
    with ops.use(backend):
        y = ops.ffn(*tensors, residual=residual, dropout_p=p, output_dropout_p=p)
        y.sum().backward()
    if p:
        assert torch.equal(y, residual) and all((t.grad == 0).all() for t in tensors)
    else:
        torch.testing.assert_close(y, ops.ffn(*tensors) + residual)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_recompute_gives_the_same_bits(backend: str, device: str, activation: str):
    grads = []
    for recompute in (False, True):
        tensors = [t.to(device).requires_grad_() for t in layer()]
        options = {"dropout_p": 0.2, "dropout_seed": SEED, "recompute": recompute}
        leaves = list(tensors)
        if activation == "swiglu":
            gate = [(t + 0.1).detach().requires_grad_() for t in tensors[1:3]]
            options |= {"weight_gate": gate[0], "bias_gate": gate[1]}
            leaves += gate
        with ops.use(backend):
            ops.ffn(*tensors, activation, **options).square().sum().backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_chunks_of_rows(monkeypatch, backend: str, device: str):
    """More rows than one chunk: the same results, summed over the chunks."""
    if backend == "triton":
        from llmkern.kernels import config

        monkeypatch.setattr(config, "FFN_CHUNK", 32)
        rows = 70
    else:
        rows = 2100  # csrc/linear.h: kChunk is 2048
    tensors = [t.to(device).requires_grad_() for t in layer(rows, 16, 24)]
    with ops.use(backend):
        y = ops.ffn(*tensors, dropout_p=0.3, dropout_seed=SEED, recompute=True)
        y.square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with ops.use("reference"):
        ops.ffn(*exact, dropout_p=0.3, dropout_seed=SEED).square().sum().backward()
    for t, e in zip(tensors, exact):
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=1e-4, atol=1e-5 * e.grad.abs().max().item())


def test_a_residual_of_another_dtype_is_added_outside():
    """Under autocast a float32 stream of residuals stays in float32."""
    tensors = layer()
    residual = torch.full((70, 48), 1 + 2**-20)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.ffn(*tensors, residual=residual)
    plain = ops.ffn(*(t.bfloat16() for t in tensors))
    assert y.dtype == torch.float32 and torch.equal(y, residual + plain)
    stream = torch.zeros(70, 48, requires_grad=True)
    ops.ffn(*tensors, residual=stream).sum().backward()
    assert (stream.grad == 1).all()


@pytest.mark.skipif(isinstance(_cpu.load(_cpu.best()), str), reason="no C++ kernels")
def test_hidden_activations_are_never_whole():
    """Backward of 8192 rows with recompute keeps no (8192, F) tensor."""
    from torch.autograd.graph import saved_tensors_hooks

    x, *weights = layer(8192, 16, 64)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.ffn(x.requires_grad_(), *weights, recompute=True)
    assert all(t.numel() < 8192 * 64 for t in saved)


@pytest.mark.parametrize(("options", "words"), [
    ({"dropout_p": 1.5}, "dropout_p is 1.5"),
    ({"output_dropout_p": -0.1}, "output_dropout_p is -0.1"),
    ({"residual": torch.ones(3, 4)}, "residual has shape (3, 4), expected (70, 48)"),
    ({"dropout_p": 0.1, "dropout_seed": torch.ones(2)}, "dropout seed is torch.float32"),
])  # fmt: skip
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        ops.ffn(*layer(), **options)
