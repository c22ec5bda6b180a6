"""The Triton matrix product: operands by TMA, programs that stay for several tiles, parts of its sum."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from error_rule import run, violations
from llmkern.kernels import config, gemm, gemm_operands, tiles

from llmkern.ops import OPS
from llmkern.ops.op import samples

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under TRITON_INTERPRET=1"),
]
LAYOUTS = {"nn": lambda x: x, "nt": lambda x: x.t().contiguous().t()}


@pytest.fixture
def tma(monkeypatch):
    """Operands come by TMA, and 3 programs go over all tiles, which are small; counts what was read so."""
    read = []

    def seen(sizes, *pairs):
        read.append(gemm_operands.operands(sizes, *pairs))
        return read[-1]

    small = {k: tiles.Tile(16, 16, 32, 1, 1) for k in tiles.TABLE if k[0] == "gemm"}
    monkeypatch.setattr(tiles, "TABLE", {**tiles.TABLE, **small})
    monkeypatch.setattr(gemm_operands, "uses_tma", lambda x: True)
    monkeypatch.setattr(gemm, "multiprocessors", lambda x: 3)
    from llmkern.kernels import ffn, linear_loss

    for module in (gemm, ffn, linear_loss):
        monkeypatch.setattr(module, "operands", seen)
    return read


def matrices(m: int, k: int, n: int, dtype=torch.bfloat16) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.randn(m, k, generator=make).to(dtype), torch.randn(k, n, generator=make).to(dtype)


@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("m, k, n", [(40, 72, 56), (16, 32, 16), (8, 200, 88)])
def test_every_layout_by_tma(tma, a_layout, b_layout, m, k, n):
    a, b = matrices(m, k, n)
    a, b = LAYOUTS[a_layout](a), LAYOUTS[b_layout](b)
    out, bias = torch.empty(m, n, dtype=a.dtype), torch.randn(n).to(a.dtype)
    gemm.gemm(a, b, out, bias)
    assert tma[0].loads == gemm_operands.order(a) + gemm_operands.order(b)
    expected = a.double() @ b.double() + bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-3)


def test_what_tma_cannot_read_is_read_by_address(tma):
    a, b = matrices(24, 20, 24)  # 40 bytes from row to row
    out = torch.empty(24, 24, dtype=a.dtype)
    gemm.gemm(a, b, out)
    assert tma[0].loads == "pointers"
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "ffn", "linear_cross_entropy"])
def test_ops_keep_their_contract_by_tma(tma, name):
    op, by_tma = OPS[name], 0
    for sample in list(samples(op, torch.bfloat16))[::9]:
        tma.clear()
        assert not violations(op, sample, torch.bfloat16, run(op, sample, backend="triton")), sample.label
        by_tma += any(read.loads != "pointers" for read in tma)
    assert by_tma >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [64, 100, 130])
def test_parts_of_the_inner_sum(monkeypatch, dtype, k):
    """With an epilogue, whose parts must be applied once; and the same bits on every run."""
    monkeypatch.setattr(config, "GEMM_STEPS", 1)
    a, b = matrices(20, k, 40, dtype)
    residual, bias = torch.randn(20, 40).to(dtype), torch.randn(40).to(dtype)
    outs = [torch.empty(20, 40, dtype=dtype) for _ in range(2)]
    for out in outs:
        gemm.gemm(a, b, out, bias, residual=residual)
    assert gemm.k_parts(1, k, 16)[1] > 1
    expected = a.double() @ b.double() + bias.double() + residual.double()
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(outs[0].double(), expected, rtol=rtol, atol=1e-3)
    assert torch.equal(*outs)


def test_parts_cover_the_inner_dimension():
    for count, k, block in [(1, 4096, 64), (48, 100_000, 64), (3, 8 * 64 * 2, 64), (127, 10**6, 16)]:
        part, parts = gemm.k_parts(count, k, block)
        assert part * (parts - 1) < k <= part * parts and (parts == 1 or part % block == 0)
    assert gemm.k_parts(128, 10**6, 64)[1] == 1 and gemm.k_parts(1, 0, 16) == (0, 1)
