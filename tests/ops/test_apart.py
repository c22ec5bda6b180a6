"""Products whose threads part the rows, or the columns, and pack the second operand each for itself."""

import pytest
import torch

from llmkern import _cpu, ops

pytestmark = pytest.mark.skipif(isinstance(_cpu.load(_cpu.best()), str), reason="no C++ kernels here")


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(
    "rows, depth, columns",
    [(400, 40, 70), (1700, 40, 850), (40, 72, 1100), (520, 40, 530), (1000, 800, 900)],
)  # by rows; by rows, columns in two parts; by columns; by columns; a sum in blocks
def test_parts_are_those_of_the_whole(rows, depth, columns, dtype, error):
    make = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, depth, generator=make).to(dtype) for n in (rows, columns))
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outs.append(ops.linear(x, w))
    finally:
        torch.set_num_threads(threads)
    expected = x.double() @ w.double().t()
    scale = expected.abs().max()
    torch.testing.assert_close(outs[0].double() / scale, expected / scale, rtol=0, atol=error)
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    "rows, depth, columns", [(400, 64, 70), (40, 64, 1100), (520, 96, 530), (100, 64, 100)]
)  # by rows; by columns; by columns; in panels for all
def test_decoded_weights_are_parted_as_others(rows, depth, columns):
    make = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, depth, generator=make) for n in (rows, columns))
    weight = ops.quantize(w, 4, 32)
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outs.append(ops.quant_linear(x, *weight))
    finally:
        torch.set_num_threads(threads)
    expected = x.double() @ ops.dequantize(*weight, torch.float64).t()
    torch.testing.assert_close(outs[0].double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(*outs)
