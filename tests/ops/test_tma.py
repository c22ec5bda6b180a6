"""Attention of all GPUs with what it walks over read by TMA, in the interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton")
from error_rule import run, violations
from llmkern.kernels import attention_scores, tma

from llmkern.ops import OPS
from llmkern.ops.op import samples

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under TRITON_INTERPRET=1"),
]
LABELS = (
    "GQA",
    "fewer keys, bottom right",
    "packed qkv",
    "documents, causal",
    "dropout and more",
    "wide values",
)


@pytest.mark.parametrize("label", LABELS)
def test_attention_by_tma(monkeypatch, label):
    described = []

    def rows_of_heads(x, rows, width):
        described.append(x)
        return tma.rows_of_heads(x, rows, width)

    monkeypatch.setattr(attention_scores, "uses_tma", lambda x: True)
    monkeypatch.setattr(attention_scores, "rows_of_heads", rows_of_heads)
    op, dtype = OPS["attention"], torch.bfloat16
    sample = next(s for s in samples(op, dtype) if s.label == label)
    assert not violations(op, sample, dtype, run(op, sample, backend="triton"))
    assert len(described) == 6  # k and v forward, dout and q for dk and dv, k and v for dq


def test_what_tma_cannot_read():
    x = torch.empty(2, 6, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert tma.heads_fit(x) and tma.heads_fit(x[:1, :1])
    assert tma.strides(x[:1])[0] == 8
    assert not tma.heads_fit(x[..., :60])
    assert not tma.heads_fit(x[..., ::2])
    assert not tma.heads_fit(x[..., 4:])
    assert not tma.heads_fit(x[:, :1].expand(2, 4, 6, 64))
    assert not tma.heads_fit(x[:0])
