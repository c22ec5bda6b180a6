"""The interpreter's shim against torch, bit for bit; and the guard pages against a planted overrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs without a GPU, under TRITON_INTERPRET=1"
)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0e38, -3.0e38, 1e-40, float("inf"), float("-inf"), float("nan")]
SIZE = 1024


@triton.jit
def _elementwise(x, y, out, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "neg":
        c = -a
    elif OP == "exp":
        c = tl.exp(a.to(tl.float32)).to(a.dtype)
    elif OP == "less":
        c = a < b
    elif OP == "equal":
        c = a == b
    elif OP == "where":
        c = tl.where(a > b, a, b)
    else:
        c = a.to(out.dtype.element_ty)
    tl.store(out + i, c)


@triton.jit
def _reduce(x, out, SIZE: tl.constexpr):
    a = tl.load(x + tl.arange(0, SIZE))
    tl.store(out, tl.sum(a, 0))


@triton.jit
def _dot(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def _square(out, n):
    i = tl.arange(0, 1)
    tl.store(out + i, (i + n) * n)


@triton.jit
def _overrun(x, out, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + tl.arange(0, 1), tl.sum(tl.load(x + i, mask=i < n + 1, other=0.0), 0))


# Triton before 3.8 negates as 0 - x, which makes 0 of 0
NEGATES_ZERO = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, SIZE, generator=generator)
    pairs = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T
    x[: pairs.shape[1]], y[: pairs.shape[1]] = pairs
    return x.to(dtype), y.to(dtype)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, with every NaN equal to every other, and 0 not to -0."""
    nan = expected.isnan()
    if not torch.equal(found.isnan(), nan):
        return False
    found, expected = (t.masked_fill(nan, 0) for t in (found, expected))
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "neg", "exp", "less", "equal", "where"])
def test_elementwise_equals_torch(op, dtype):
    x, y = operands(dtype)
    expected = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "neg": lambda: -x if NEGATES_ZERO else 0 - x,
        "exp": lambda: torch.from_numpy(np.exp(x.float().numpy())).to(dtype),
        "less": lambda: x < y,
        "equal": lambda: x == y,
        "where": lambda: torch.where(x > y, x, y),
    }[op]()
    out = torch.empty_like(expected)
    with np.errstate(all="ignore"):
        _elementwise[(1,)](x, y, out, op, SIZE)
    assert same_bits(out, expected)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cast_equals_torch(source, target):
    x, y = operands(source)
    out = torch.empty(SIZE, dtype=target)
    _elementwise[(1,)](x, y, out, "cast", SIZE)
    assert same_bits(out, x.to(target))


def test_every_bfloat16_survives_float32():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide, back = torch.empty(len(x)), torch.empty_like(x)
    _elementwise[(1,)](x, x, wide, "cast", len(x))
    _elementwise[(1,)](wide, wide, back, "cast", len(x))
    assert same_bits(wide, x.float()) and same_bits(back, x)


def test_reduction_of_bfloat16_is_refused():
    x = torch.arange(-8, 8)
    out = torch.empty(1)
    _reduce[(1,)](x.float(), out, 16)
    assert out.item() == -8.0
    with pytest.raises(Exception, match="cast to float32"):
        _reduce[(1,)](x.bfloat16(), out, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dot_is_exact_on_integers(dtype):
    x, y = torch.randint(-8, 9, (2, 32, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(32, 32)
    _dot[(1,)](x, y, out, 32)
    assert torch.equal(out, x.float() @ y.float())


def test_int32_overflow_is_reported():
    from triton_interpreter import overflow_checks

    out = torch.zeros(1, dtype=torch.int32)
    _square[(1,)](out, 70000)  # wraps around in silence
    with overflow_checks(), pytest.raises(Exception, match="int32 overflow"):
        _square[(1,)](out, 70000)


@pytest.mark.parametrize("n, ends_with", [(15, 0), (16, -signal.SIGSEGV)])
def test_guard_page_ends_a_process_that_overruns(n, ends_with):
    script = (
        "import torch; from guard_pages import guarded; from test_interpreter import _overrun\n"
        f"_overrun[(1,)](guarded(torch.ones(16)), torch.zeros(1), {n}, 32)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True)
    assert result.returncode == ends_with


def test_guarded_copies():
    from guard_pages import guarded

    for x in (torch.randn(3, 5), torch.arange(4097, dtype=torch.uint8), torch.empty(0, 3)):
        for side in ("start", "end"):
            assert torch.equal(guarded(x, side), x)
