"""Products of a few rows take another way through the weight, and give the bits of products of many."""

import pytest
import torch

import llmkern
from llmkern import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 400, 1601])  # one block of the depth, and several
@pytest.mark.parametrize("turned", [False, True])  # a weight as Hugging Face's Conv1D has it
def test_the_bits_of_many_rows(backend, device, dtype, width, turned, strict):
    if backend == "triton":
        pytest.skip("torch computes linears on GPUs")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (40, 300))
    weight = weight.t().contiguous().t() if turned else weight
    bias = torch.randn(300, generator=generator).to(dtype)
    with llmkern.use(backend):
        whole = ops.linear(x, weight, bias)
        for rows in (1, 2, 3, 4, 5, 12, 13):
            assert torch.equal(ops.linear(x[:rows], weight, bias), whole[:rows])
    torch.testing.assert_close(
        whole, torch.nn.functional.linear(x, weight, bias), rtol=2e-2, atol=2e-2 * width**0.5
    )
