"""Cross-entropy of rows that begin anywhere: read and written in whole units, and nothing beyond them."""

import os

import pytest
import torch
import torch.nn.functional as F
from guard_pages import guarded

from llmkern import ops

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, classes", [(3, 17), (16, 33), (8, 50), (2, 300)])
def test_rows_that_begin_anywhere(backend: str, device: str, dtype, rows, classes):
    """The last row ends at a page that may not be touched, and the first begins at one."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a guarded tensor is on the CPU")
    make = torch.Generator().manual_seed(0)
    x = torch.randn(rows, classes, generator=make).to(dtype)
    target = torch.randint(classes, (rows,), generator=make)
    for side in ("end", "start"):
        logits = guarded(x, side).requires_grad_()
        with ops.use(backend):
            loss = ops.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
            loss.backward(torch.ones_like(loss))
        exact = x.double().requires_grad_()
        expected = F.cross_entropy(exact, target, label_smoothing=0.1, reduction="none")
        expected.sum().backward()
        unit = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(loss.double(), expected, rtol=unit, atol=1e-5)
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=unit)


def test_units_are_used(monkeypatch):
    """Blocks begin before a row where its address allows it, in both directions."""
    loss = pytest.importorskip("llmkern.kernels.loss")
    x = torch.empty(4, 33, dtype=torch.bfloat16)
    assert loss._unit(x) == 8 and loss._unit(x.float()) == 4
    assert loss._unit(x[:, :32].contiguous()) == 1  # every row begins at 16 bytes already
    assert loss._unit(x.view(-1)[1:].view(-1)[:99].view(3, 33)) == 1  # none needs to
