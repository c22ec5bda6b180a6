"""Bad input gets one sentence: which argument, its value, what was expected."""

import pytest
import torch

from llmkern import ops


def r(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


CASES = [
    ("window", lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, window=(-2, 0)), "window is (-2, 0), expected"),
    ("dropout", lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, dropout_p=1.5), "dropout_p is 1.5, expected"),
    ("softcap", lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, softcap=-1.0), "softcap is -1.0, expected"),
    (
        "slopes",
        lambda: ops.attention(*[r(1, 2, 2, 4)] * 3, alibi_slopes=r(3)),
        "alibi_slopes is torch.float32 of shape (3,), expected floating point of shape (2,) or (1, 2)",
    ),
    (
        "sinks",
        lambda: ops.attention(*[r(1, 2, 2, 4)] * 3, sinks=r(1)),
        "sinks is torch.float32 of shape (1,)",
    ),
    (
        "documents",
        lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, document_ids=torch.zeros(1, 3, dtype=torch.int64)),
        "document_ids is torch.int64 of shape (1, 3) for 2 queries",
    ),
    (
        "packed rank",
        lambda: ops.attention_varlen(*[r(1, 2, 2, 4)] * 3, torch.tensor([0, 1])),
        "query has shape (1, 2, 2, 4), expected 3 dimensions",
    ),
    (
        "packed order",
        lambda: ops.attention_varlen(*[r(4, 2, 4)] * 3, torch.tensor([0, 3, 2])),
        "cu_seqlens_q is [0, 3, 2], expected numbers from 0 to 4 that never decrease",
    ),
    (
        "packed count",
        lambda: ops.attention_varlen(*[r(4, 2, 4)] * 3, torch.tensor([0, 4]), torch.tensor([0, 1, 4])),
        "cu_seqlens_k has 3 elements, expected 2",
    ),
    ("rank", lambda: ops.attention(r(2, 3, 4), r(2, 3, 4), r(2, 3, 4)), "query has shape (2, 3, 4)"),
    (
        "dtype mix",
        lambda: ops.attention(r(1, 1, 2, 4), r(1, 1, 2, 4, dtype=torch.bfloat16), r(1, 1, 2, 4)),
        "key is torch.bfloat16",
    ),
    (
        "device mix",
        lambda: ops.attention(r(1, 1, 2, 4), r(1, 1, 2, 4, device="meta"), r(1, 1, 2, 4)),
        "key is on meta",
    ),
    ("integers", lambda: ops.attention(*[r(1, 1, 2, 4, dtype=torch.int64)] * 3), "query is torch.int64"),
    ("groups", lambda: ops.attention(r(1, 5, 2, 4), r(1, 2, 2, 4), r(1, 2, 2, 4)), "divides the query's 5"),
    ("no heads", lambda: ops.attention(r(1, 5, 2, 4), r(1, 0, 2, 4), r(1, 0, 2, 4)), "key has 0 heads"),
    ("head dim", lambda: ops.attention(r(1, 1, 2, 4), r(1, 1, 2, 8), r(1, 1, 2, 8)), "head dim 4"),
    ("head dim 0", lambda: ops.attention(r(1, 1, 2, 0), r(1, 1, 2, 0), r(1, 1, 2, 0)), "head dim 0"),
    (
        "value shape",
        lambda: ops.attention(r(1, 1, 2, 4), r(1, 1, 3, 4), r(1, 1, 2, 4)),
        "value has shape (1, 1, 2, 4)",
    ),
    (
        "mask shape",
        lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, attn_mask=r(3, 3)),
        "attn_mask has shape (3, 3)",
    ),
    (
        "mask dtype",
        lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, attn_mask=r(2, 2, dtype=torch.int64)),
        "attn_mask is torch.int64",
    ),
    (
        "align",
        lambda: ops.attention(*[r(1, 1, 2, 4)] * 3, is_causal=True, causal_align="left"),
        "causal_align is 'left'",
    ),
    ("activation", lambda: ops.ffn(r(2, 4), r(8, 4), None, r(4, 8), None, "glue"), "activation is 'glue'"),
    ("no gate", lambda: ops.ffn(r(2, 4), r(8, 4), None, r(4, 8), None, "swiglu"), "expected weight_gate"),
    (
        "gate bias",
        lambda: ops.ffn(r(2, 4), r(8, 4), None, r(4, 8), None, "gelu", bias_gate=r(8)),
        "bias_gate",
    ),
    (
        "weight shape",
        lambda: ops.ffn(r(2, 4), r(8, 5), None, r(4, 8), None),
        "weight_in has shape (8, 5), expected (8, 4)",
    ),
    (
        "bias dtype",
        lambda: ops.ffn(r(2, 4), r(8, 4), r(8, dtype=torch.float16), r(4, 8), None),
        "bias_in is torch.float16",
    ),
    ("norm shape", lambda: ops.layer_norm(r(2, 4), (5,)), "x has shape (2, 4)"),
    ("norm weight", lambda: ops.rms_norm(r(2, 4), (4,), r(3)), "weight has shape (3,)"),
    ("norm dtype", lambda: ops.rms_norm(r(2, 4), (4,), r(4, dtype=torch.float16)), "weight is torch.float16"),
    (
        "residual",
        lambda: ops.layer_norm(r(2, 4), (4,), residual=r(4)),
        "residual is torch.float32 of shape (4,)",
    ),
    (
        "reduction",
        lambda: ops.cross_entropy(r(2, 4), torch.tensor([0, 1]), reduction="avg"),
        "reduction is 'avg'",
    ),
    (
        "smoothing",
        lambda: ops.cross_entropy(r(2, 4), torch.tensor([0, 1]), label_smoothing=2.0),
        "label_smoothing is 2.0",
    ),
    ("target dtype", lambda: ops.cross_entropy(r(2, 4), r(2, dtype=torch.int32)), "target is torch.int32"),
    (
        "target shape",
        lambda: ops.cross_entropy(r(2, 4), torch.tensor([0])),
        "target has shape (1,), expected (2,)",
    ),
    ("class weight", lambda: ops.cross_entropy(r(2, 4), torch.tensor([0, 1]), r(3)), "weight has shape (3,)"),
    ("no classes", lambda: ops.cross_entropy(r(2, 0), torch.tensor([0, 1])), "at least one class"),
    ("backend", lambda: ops.use("cuda").__enter__(), "backend is 'cuda'"),
    ("mode", lambda: ops.set_fallback("loud"), "mode is 'loud'"),
]


@pytest.mark.parametrize(("call", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("target", [4, -1, 2**40])
def test_target_out_of_range(implementation: str, target: int):
    with (
        ops.use(implementation),
        pytest.raises(IndexError, match=rf"target {target} is out of range, expected 0 to 3"),
    ):
        ops.cross_entropy(torch.zeros(3, 4), torch.tensor([0, target, -100]))
