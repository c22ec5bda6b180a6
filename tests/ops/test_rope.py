"""Rotary embeddings: Hugging Face's frequencies and rotation, geometry, bad input."""

import math

import pytest
import torch
from guard_pages import guarded

from llmkern import ops
from llmkern.nn import RotaryEmbedding

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16, "truncate": False},
    "yarn, factor": YARN | {"factor": None, "attention_factor": 1.3},
    "llama3": LLAMA3,
}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("seq_len", [None, 5000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_of_hugging_face(name: str, seq_len: int | None):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = SCALINGS[name]
    kind = scaling.get("rope_type", scaling.get("type"))
    parameters = {**scaling, "rope_type": kind, "rope_theta": 500000.0}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=parameters
    )
    theirs, their_factor = utils.ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len)
    ours, factor = ops.rope_frequencies(64, 500000.0, scaling, max_position_embeddings=2048, seq_len=seq_len)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-6)


def test_rotation_of_hugging_face(backend: str, device: str, strict):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    query, key = randn(2, 4, 9, 32).to(device), randn(2, 2, 9, 32).to(device)
    cos, sin = ops.rope_table(9, 32, device=device)
    double = (torch.cat((t, t), -1)[None] for t in (cos, sin))
    with ops.use(backend):
        ours = ops.rope(query, key, cos, sin)
    for a, b in zip(ours, llama.apply_rotary_pos_emb(query, key, *double)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(backend: str, device: str, interleaved: bool, strict):
    query, key = randn(1, 1, 1, 16).to(device), randn(1, 2, 1, 16)[:, 1:].to(device)
    tables = ops.rope_table(300, 16, device=device)

    def score(p: int, q: int) -> float:
        places = (torch.tensor([i], device=device) for i in (p, q))
        a, b = (
            ops.rope(x, None, *tables, interleaved=interleaved, position_ids=i)
            for x, i in zip((query, key), places)
        )
        return (a * b).sum().item()

    with ops.use(backend):
        assert score(7, 3) == pytest.approx(score(254, 250), abs=1e-4)
        assert score(7, 3) != pytest.approx(score(7, 1), abs=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_undoes_forward(backend: str, device: str, interleaved: bool, strict):
    x = randn(1, 2, 5, 24).to(device).requires_grad_()
    with ops.use(backend):
        y = ops.rope(x, None, *ops.rope_table(5, 16, device=device), interleaved=interleaved)
        (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach())


def test_memory_layout_is_kept(backend: str, device: str, strict):
    tables = ops.rope_table(5, 8, device=device)
    with ops.use(backend):
        for x in (randn(2, 5, 3, 8).transpose(1, 2), randn(2, 3, 5, 8)):
            assert ops.rope(x.to(device), None, *tables).stride() == x.stride()


def test_nan_stays_in_its_pair(backend: str, device: str, strict):
    x = randn(1, 1, 4, 16).to(device)
    x[0, 0, 2, 3] = math.nan
    with ops.use(backend):
        y = ops.rope(x, None, *ops.rope_table(4, 12, device=device))
    assert y.isnan().nonzero().tolist() == [[0, 0, 2, 3], [0, 0, 2, 9]]


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("position", [4, -1, 2**40])
def test_position_out_of_range(implementation: str, position: int):
    ids = torch.tensor([0, position])
    with (
        ops.use(implementation),
        pytest.raises(IndexError, match=f"position {position} is out of range, expected 0 to 3"),
    ):
        ops.rope(randn(1, 1, 2, 8), None, *ops.rope_table(4, 8), position_ids=ids)


def test_position_out_of_range_is_nan_on_gpus():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([0, 4], device=device)
    with ops.use("triton"):
        y = ops.rope(
            randn(1, 1, 2, 8).to(device), None, *ops.rope_table(4, 8, device=device), position_ids=ids
        )
    assert y[0, 0, 1].isnan().all() and not y[0, 0, 0].isnan().any()


def test_factors_divide_frequencies():
    """llama.cpp writes Llama 3's scaling as one factor a pair."""
    plain, _ = ops.rope_frequencies(8)
    scaled, _ = ops.rope_frequencies(8, scaling={"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 8.0]})
    assert torch.equal(scaled, plain / torch.tensor([1, 2, 4, 8]))


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_read_or_write_outside(backend: str, device: str, dtype: torch.dtype, side: str, strict):
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")
    tables = [guarded(t, side) for t in ops.rope_table(3, 14)]
    for interleaved in (False, True):
        query, key = (guarded(randn(1, h, 3, 17, dtype=dtype), side) for h in (3, 1))
        with ops.use(backend):
            ops.rope(query.requires_grad_(), key, *tables, interleaved=interleaved)[0].sum().backward()
            ops.rope_(query.detach(), key, *tables, interleaved=interleaved)


def test_in_place_needs_no_gradient():
    x, tables = randn(1, 1, 2, 8), ops.rope_table(2, 8)
    assert ops.rope_(x, None, *tables) is x
    with pytest.raises(RuntimeError, match="rope_inplace has no backward"):
        ops.rope_(x.requires_grad_(), None, *tables)


def test_module_keeps_its_tables():
    for kwargs in ({}, {"scaling": {"rope_type": "dynamic", "factor": 2.0}}):
        rotary = RotaryEmbedding(8, 4, **kwargs)
        assert not rotary.state_dict()
        exact = ops.rope_table(4, 8)[0]
        assert torch.equal(rotary.bfloat16().cos, exact)
        assert torch.equal(rotary.to("meta").to_empty(device="cpu").cos, exact)
        x = randn(1, 2, 7, 8)
        tables = ops.rope_table(7, 8, max_position_embeddings=4, **kwargs)
        torch.testing.assert_close(rotary(x), ops.rope(x, None, *tables))
        assert rotary.cos.shape == (7, 4)


X = torch.ones(1, 2, 3, 8)
TABLES = ops.rope_table(3, 8)
BAD = [
    (lambda: ops.rope(X[0], None, *TABLES), "query has shape (2, 3, 8)"),
    (lambda: ops.rope(X, X.double(), *TABLES), "key is torch.float64"),
    (lambda: ops.rope(X, X[:, :, :2], *TABLES), "key has shape (1, 2, 2, 8)"),
    (lambda: ops.rope(X, None, *ops.rope_table(3, 10)), "cos has shape (3, 5)"),
    (lambda: ops.rope(X, None, TABLES[0], TABLES[1][:2]), "sin has shape (2, 4)"),
    (lambda: ops.rope(X, None, *(t.half() for t in TABLES)), "cos is torch.float16"),
    (lambda: ops.rope(X, None, *ops.rope_table(2, 8)), "cos has 2 positions"),
    (lambda: ops.rope(X, None, *TABLES, position_ids=torch.zeros(3)), "position_ids is torch.float32"),
    (lambda: ops.rope(X, None, *TABLES, position_ids=torch.arange(4)), "position_ids has shape (4,)"),
    (lambda: ops.rope(X.to("meta"), None, *TABLES), "cos is on cpu"),
    (lambda: ops.rope_(X.expand(2, -1, -1, -1), None, *TABLES), "query is expanded"),
    (lambda: ops.rope_frequencies(7), "dim is 7"),
    (lambda: ops.rope_frequencies(8, scaling={"rope_type": "longrope"}), "'longrope'"),
    (lambda: ops.rope_frequencies(8, scaling={"rope_type": "linear"}), "scaling has no 'factor'"),
    (lambda: ops.rope_frequencies(8, scaling={"rope_type": "factors", "factors": [1]}), "has 1 factors"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and len(message) < 200
