"""Decode attention and KVCache: what the op table cannot say."""

import math

import pytest
import torch
import torch.nn.functional as F
from guard_pages import guarded
from torch import Tensor

import llmkern
from llmkern import ops
from llmkern.models import GPT, GPTConfig
from llmkern.nn import KVCache

pytestmark = pytest.mark.usefixtures("strict")


def randn(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def lengths(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def rope(positions: int, half: int, device: str) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions), 100.0 ** (-torch.arange(half) / half))
    return angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize("window", [None, (6, 0)])
@pytest.mark.parametrize("prompt", [9, 25])
@pytest.mark.parametrize("page_size", [None, 4])
def test_token_by_token_is_causal_attention(
    backend: str, device: str, page_size: int | None, prompt: int, window: tuple[int, int] | None
):
    """The prompt, then one token, then 19, as attention over the whole sequence has them; on a CPU a long
    prompt goes through attention's kernel.
    """
    n = prompt + 20
    q, k, v = randn(2, 4, n, 8, device=device), *(randn(2, 2, n, 8, device=device, seed=s) for s in (1, 2))
    cos, sin = rope(48, 3, device)

    def rotated(x: Tensor) -> Tensor:  # Su et al. 2021, with complex numbers
        pairs = torch.complex(x[..., :3].double(), x[..., 3:6].double())
        turned = pairs * torch.complex(cos[:n].double(), sin[:n].double())
        return torch.cat((turned.real, turned.imag, x[..., 6:].double()), dim=-1)

    back = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    seen = (back >= 0) & (back <= (n if window is None else window[0]))
    expected = F.scaled_dot_product_attention(
        rotated(q), rotated(k), v.double(), attn_mask=seen, enable_gqa=True
    )
    cache = KVCache(2, 2, 48, 8, device=device, page_size=page_size)
    with ops.use(backend), ops.dispatch.record() as ran:
        for i, j in ((0, prompt), (prompt, prompt + 1), (prompt + 1, n)):
            new = (t[:, :, i:j] for t in (q, k, v))
            out = cache.attend(*new, cos=cos, sin=sin, window=window)
            torch.testing.assert_close(out.double(), expected[:, :, i:j], rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [n, n]
    through_attention = prompt >= 16 and page_size is None and device == "cpu"
    assert ("attention_fwd" in {half for half, _ in ran}) == through_attention


@pytest.mark.parametrize("paged", [False, True])
def test_what_lies_behind_the_length_is_not_read(backend: str, device: str, paged: bool):
    results = []
    for rubbish in (0.0, math.nan):
        k, v = (torch.full((2, 1, 12, 8), rubbish, device=device) for _ in range(2))
        k[0, :, :5], v[0, :, :5] = randn(2, 1, 5, 8, device=device)
        k[1, :, :12], v[1, :, :12] = randn(2, 1, 12, 8, device=device, seed=1)
        options = {}
        if paged:  # pages of 4; those of sequence 1 first; 99 is not needed
            k, v = (
                t.view(2, 1, 3, 4, 8).transpose(1, 2).flatten(0, 1)[[3, 4, 5, 0, 1, 2]].contiguous()
                for t in (k, v)
            )
            options["block_table"] = lengths(3, 4, 99, 0, 1, 2, device=device).view(2, 3)
        with ops.use(backend):
            q = randn(2, 2, 1, 8, device=device)
            results.append(ops.decode_attention(q, k, v, lengths(5, 12, device=device), **options))
    assert results[1].isfinite().all()
    assert torch.equal(*results)


def test_only_the_new_rows_are_written(backend: str, device: str):
    k, v = randn(2, 2, 2, 10, 8, device=device)
    before = k.clone(), v.clone()
    new = randn(2, 2, 2, 2, 8, device=device, seed=1)
    with ops.use(backend):
        seqlens = lengths(3, 8, device=device)
        ops.decode_attention(randn(2, 2, 2, 8, device=device), k, v, seqlens, *new)
    for cache, old, tokens in zip((k, v), before, new):
        for b, start in enumerate((3, 8)):
            assert torch.equal(cache[b, :, start : start + 2], tokens[b])
            cache[b, :, start : start + 2] = old[b, :, start : start + 2]
        assert torch.equal(cache, old)


def test_nan_stays_in_its_sequence_and_group(backend: str, device: str):
    k, v = randn(2, 2, 2, 10, 8, device=device)
    q = randn(2, 4, 1, 8, device=device)
    k[0, 1, 3, 2] = math.nan
    with ops.use(backend):
        out = ops.decode_attention(q, k, v, lengths(7, 7, device=device))
    assert out[0, 2:].isnan().all() and out.isnan().sum() == 16
    for dtype in (torch.float32, torch.int8):  # a token that is NaN
        cache = KVCache(1, 1, 8, 8, dtype, device)
        with ops.use(backend):
            out = cache.attend(q[:1, :, :1], *torch.full((2, 1, 1, 1, 8), math.nan, device=device))
        assert out.isnan().all()


def test_nothing_to_see(backend: str, device: str):
    caches = torch.full((2, 2, 2, 9, 8), math.nan, device=device)
    with ops.use(backend):
        out, lse = ops.decode_attention(
            randn(2, 4, 3, 8, device=device), *caches, lengths(0, 0, device=device), return_lse=True
        )
    assert (out == 0).all() and (lse == -math.inf).all()


BAD_PAGES = {"page": 4, "far page": 2**28}  # of 4; the second is memory that nobody has


@pytest.mark.parametrize("wrong", ["full", "negative", "page", "far page", "rope"])
def test_lengths_and_pages_that_do_not_fit(backend: str, device: str, wrong: str):
    """One sentence on the CPU; the Triton kernel, which cannot know in time, gives NaN and writes nothing."""
    k, v = randn(2, 4, 1, 4, 8, device=device)  # two sequences of two pages
    table, seqlens, options = lengths(0, 1, 2, 3, device=device).view(2, 2), lengths(2, 6, device=device), {}
    if wrong == "rope":
        options["cos"], options["sin"] = rope(6, 4, device)
    elif wrong in BAD_PAGES:
        table[1, 1] = BAD_PAGES[wrong]
    else:
        seqlens[1] = 8 if wrong == "full" else -1
    before = k.clone(), v.clone()
    new = randn(2, 2, 1, 1, 8, device=device)

    def call(run: str) -> Tensor:
        with ops.use(run):
            q = randn(2, 1, 1, 8, device=device)
            return ops.decode_attention(q, k, v, seqlens, *new, block_table=table, **options)

    if backend == "triton":
        out = call(backend)
        assert out[0].isfinite().all() and out[1].isnan().all()
        assert torch.equal(k[2:], before[0][2:]) and torch.equal(v[2:], before[1][2:])
        return
    words = f"block_table has {BAD_PAGES[wrong]}" if wrong in BAD_PAGES else "cache_seqlens has"
    messages = []
    for run in (backend, "reference"):
        with pytest.raises(ValueError, match=words) as caught:
            call(run)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and len(messages[0]) < 200
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


def test_int8_is_as_exact_as_its_values(backend: str, device: str):
    """Against float64 on what int8 holds; which is within half a step of the tokens."""
    cache = KVCache(2, 2, 40, 16, torch.int8, device)
    k, v = randn(2, 2, 2, 33, 16, device=device)
    with ops.use(backend):
        cache.append(k, v)
        out = cache.attend(q := randn(2, 6, 1, 16, device=device))
    scales = [s[:, :, :33, None].double() for s in (cache.k_scale, cache.v_scale)]
    held = [t[:, :, :33] * s for t, s in zip((cache.k, cache.v), scales)]
    for tokens, values, scale in zip((k, v), held, scales):
        assert ((tokens - values).abs() <= 0.5001 * scale).all()
        assert (values.abs().amax(-1) - tokens.abs().amax(-1)).abs().max() < 1e-6
    exact = F.scaled_dot_product_attention(q.double(), *held, enable_gqa=True)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def test_result_does_not_depend_on_neighbours_or_capacity():
    """Batch, size of the cache and pages change no bit of the C++ kernel."""
    k, v = randn(2, 2, 1, 300, 16)
    q, seqlens = randn(2, 2, 1, 16), lengths(290, 7)
    with ops.use("cpp"):
        both = ops.decode_attention(q, k, v, seqlens)
        alone = ops.decode_attention(q[:1], k[:1], v[:1], seqlens[:1])
        short = ops.decode_attention(q[1:], k[1:, :, :7], v[1:, :, :7], seqlens[1:])
        pages = [t.view(2, 1, 60, 5, 16).transpose(1, 2).flatten(0, 1).contiguous() for t in (k, v)]
        table = torch.arange(120, dtype=torch.int32).view(2, 60)
        paged = ops.decode_attention(q, *pages, seqlens, block_table=table)
    assert torch.equal(both[:1], alone) and torch.equal(both[1:], short) and torch.equal(both, paged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["start", "end"])
def test_no_read_or_write_outside(backend: str, device: str, dtype: torch.dtype, side: str):
    """Tensors whose storage touches an unmapped page: one element too far ends the process."""
    if device != "cpu":
        pytest.skip("guard pages are memory of the CPU")
    for dim, capacity in ((7, 21), (65, 5)):
        q, k, v, *new = (
            guarded(randn(1, heads, length, dim).to(dtype), side)
            for heads, length in ((3, 2), (1, capacity), (1, capacity), (1, 2), (1, 2))
        )
        cos, sin = (guarded(t, side) for t in rope(capacity, dim // 2, device))
        with ops.use(backend):
            seqlens = guarded(lengths(capacity - 2), side)
            ops.decode_attention(q, k, v, seqlens, *new, cos=cos, sin=sin, softcap=3.0)


def test_last_stride_falls_back():
    q, k, v = randn(1, 1, 1, 16), *randn(2, 1, 1, 8, 32)[..., ::2]
    with pytest.raises(ops.FallbackError, match="last stride is not 1"):
        ops.decode_attention(q, k, v, lengths(8))
    assert "last stride is not 1" in str(llmkern.explain("decode_attention", q, k, v, lengths(8)))


Q, CACHE = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 9, 8)
NEW, INT8 = torch.ones(2, 2, 1, 8), torch.ones(2, 2, 9, 8, dtype=torch.int8)
BAD = {
    "query rank": (lambda d: d(Q[0], CACHE, CACHE, lengths(1, 1)), "query has shape (4, 1, 8)"),
    "heads": (lambda d: d(Q[:, :3], CACHE, CACHE, lengths(1, 1)), "divides the query's 3"),
    "batch": (lambda d: d(Q[:1], CACHE, CACHE, lengths(1)), "k_cache has shape (2, 2, 9, 8), expected batch"),
    "head dim": (lambda d: d(Q[..., :4], CACHE, CACHE, lengths(1, 1)), "head dim 4"),
    "v_cache": (lambda d: d(Q, CACHE, CACHE[:, :1], lengths(1, 1)), "v_cache has shape (2, 1, 9, 8)"),
    "dtype": (lambda d: d(Q, CACHE.half(), CACHE.half(), lengths(1, 1)), "k_cache is torch.float16"),
    "seqlens": (lambda d: d(Q, CACHE, CACHE, lengths(1)), "cache_seqlens has shape (1,)"),
    "float seqlens": (lambda d: d(Q, CACHE, CACHE, torch.ones(2)), "cache_seqlens is torch.float32"),
    "key alone": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), NEW), "key and value"),
    "key": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), NEW, NEW[:, :1]), "value has shape (2, 1, 1, 8)"),
    "too many": (
        lambda d: d(torch.ones(2, 4, 10, 8), CACHE, CACHE, lengths(0, 0), *torch.ones(2, 2, 2, 10, 8)),
        "at most 9 new tokens",
    ),
    "table": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), block_table=lengths(0)), "block_table has shape"),
    "long table": (
        lambda d: d(Q, CACHE, CACHE, lengths(1, 1), block_table=torch.zeros(2, 1, dtype=torch.int64)),
        "block_table is torch.int64",
    ),
    "cos alone": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), cos=torch.ones(9, 4)), "cos and sin"),
    "cos": (
        lambda d: d(Q, CACHE, CACHE, lengths(1, 1), cos=torch.ones(9, 5), sin=torch.ones(9, 5)),
        "cos has shape (9, 5), expected (positions, at most 4)",
    ),
    "no scales": (lambda d: d(Q, INT8, INT8, lengths(1, 1)), "k_scale is missing"),
    "scales": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), k_scale=torch.ones(2, 2, 9)), "k_scale is given"),
    "scale shape": (
        lambda d: d(Q, INT8, INT8, lengths(1, 1), k_scale=torch.ones(2, 2), v_scale=torch.ones(2, 2)),
        "k_scale has shape (2, 2)",
    ),
    "window": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), window=(-2, 0)), "window is (-2, 0)"),
    "softcap": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), softcap=-1.0), "softcap is -1.0"),
    "alibi": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), alibi_slopes=torch.ones(3)), "alibi_slopes has"),
    "sinks": (lambda d: d(Q, CACHE, CACHE, lengths(1, 1), sinks=torch.ones(2, 4)), "sinks has shape (2, 4)"),
    "page size": (lambda d: KVCache(1, 1, 8, 8, page_size=0), "page_size is 0"),
    "cache dtype": (lambda d: KVCache(1, 1, 8, 8, torch.int32), "dtype is torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_one_sentence(call, words: str):
    with pytest.raises(ValueError) as caught:
        call(ops.decode_attention)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and len(message) < 200


def test_cache_truncate_and_reset():
    cache = KVCache(2, 1, 8, 4, page_size=3)
    assert cache.k.shape == (6, 1, 3, 4) and cache.nbytes == 2 * 6 * 3 * 4 * 4
    assert KVCache(2, 3, 8, 4, torch.int8).nbytes == 2 * 2 * 3 * 8 * (4 + 4)
    q, k, v = randn(3, 2, 1, 6, 4)
    cache.append(k, v)
    expected = cache.attend(q[:, :, 3:4], *(t[:, :, 3:4] for t in (k, v)))
    assert cache.lengths.tolist() == [7, 7]
    cache.truncate(torch.tensor([6, 5]))
    assert cache.lengths.tolist() == [6, 5]
    cache.truncate(6)
    assert cache.lengths.tolist() == [6, 5]
    cache.lengths[1] = 6  # what was forgotten is still there, until it is overwritten
    assert torch.equal(cache.attend(q[:, :, 3:4], *(t[:, :, 3:4] for t in (k, v))), expected)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    with pytest.raises(ValueError, match="at most 9 new tokens"):
        cache.append(*torch.zeros(2, 2, 1, 10, 4))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-5), ({"page_size": 5}, 1e-5), ({"dtype": torch.bfloat16}, 2e-2), ({"dtype": torch.int8}, 2e-2)],
    ids=str,
)
def test_gpt_with_caches(options: dict, tolerance: float):
    """A prompt and two more steps give the hidden states of the whole sequence."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=17, block_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
    idx = torch.randint(17, (2, 12))
    caches = model.new_caches(2, 12, **options)
    with torch.no_grad():
        whole = model.hidden(idx)
        parts = [model.hidden(idx[:, i:j], caches) for i, j in ((0, 7), (7, 8), (8, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=tolerance, atol=tolerance)


def test_generate_with_caches_is_generate_without():
    """Also past block_size, where every step sees other positions."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=32)).eval()
    plain = GPT(model.config, kernels=False).eval()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(50, (3, 4))
    assert torch.equal(model.generate(idx, 8, temperature=0), plain.generate(idx, 8, temperature=0))
