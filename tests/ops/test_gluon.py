"""Attention for sm_90 in Gluon: its source over a model of the GPU, against float64; and who may run it."""

import math
import re
from functools import partial
from pathlib import Path
from unittest import mock

import gluon_model
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
from llmkern.kernels import attention_gluon, attention_hopper, tiles
from llmkern.kernels.attention_scores import LOG2E, Rules

FOREVER = 2**20  # a diagonal from which every query sees every key
# batch, heads, key heads, queries, keys, head dim, diagonal, programs, heads together
SHAPES = {
    "square": (1, 2, 1, 130, 130, 64, 0, 3, 2),
    "more keys": (2, 3, 1, 300, 400, 40, 100, 3, 2),
    "rows without keys": (1, 2, 2, 300, 200, 64, -120, 2, 1),
    "not causal": (1, 2, 2, 65, 513, 64, FOREVER, 1, 2),
    "many tiles": (1, 4, 2, 700, 700, 32, 0, 2, 3),
    "one query": (3, 2, 1, 1, 77, 16, 76, 4, 6),
}


def qkv(b, h, h_kv, s_q, s_k, d) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as a projection gives them, (B, S, H, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (b, s_q, h, d), (b, s_k, h_kv, d), (b, s_k, h_kv, d)
    return tuple(torch.randn(s, generator=generator).bfloat16().transpose(1, 2) for s in shapes)


def reference(q, k, v, diagonal) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    s = q.double() @ k.mT / math.sqrt(q.shape[3])
    seen = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None] + diagonal
    s = s.masked_fill(~seen.to(s.device), -math.inf)
    return s.softmax(-1).nan_to_num() @ v, s.logsumexp(-1)


def run(module, b, h, h_kv, s_q, s_k, d, diagonal, programs, section) -> None:
    """Run the kernel on the model and hold it to the reference."""
    q, k, v = qkv(b, h, h_kv, s_q, s_k, d)
    out, lse = torch.full_like(q, math.nan), torch.full((b, h, s_q), math.nan)
    tile = tiles.TABLE["attention_fwd_gluon", "sm_90", 2, "64"]
    boxes = (tile.rows // 2, tile.cols, tile.cols, tile.rows // 2)
    descriptors = [gluon_model.Descriptor(t, [1, 1, n, 64]) for t, n in zip((q, k, v, out), boxes)]
    gluon_model.launch(
        module, "hopper_forward_kernel", programs, *descriptors, gluon_model.Pointer(lse), b, h, h // h_kv,
        s_q, s_k, diagonal, section, LOG2E / math.sqrt(d), diagonal != FOREVER, tile.stages,
    )  # fmt: skip
    expected, expected_lse = reference(q, k, v, diagonal)
    assert (out.double() - expected).abs().max() < 0.01 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(shape):
    run(vars(attention_hopper), *shape)


SYNCHRONISING = re.compile(
    r"mbarrier\.(init|wait|expect|arrive)|fence_async_shared\(\)|tma\.store_wait|warpgroup_mma_wait\("
)
SOURCE = Path(attention_hopper.__file__).read_text().replace("@gluon.jit\n", "")
# lines that the result does not need: the turns of the consumers, a wait that keeps two instructions apart
SPARE = re.compile(r"turns\.index|mbarrier\.wait\(v_full\.index\(before\), before_phase\)")


def planted() -> list[int]:
    """Numbers of the lines that synchronise, in the kernels."""
    lines = SOURCE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    found = (i for i in range(start, len(lines)) if SYNCHRONISING.search(lines[i]))
    return [i for i in found if not SPARE.search(lines[i])]


@pytest.mark.parametrize("number", planted())
def test_model_finds_a_missing_wait(number):
    """Each line that synchronises, taken out in turn, gives a hazard, a deadlock or a wrong result."""
    lines = SOURCE.splitlines()
    line = lines[number]
    indent = line[: len(line) - len(line.lstrip())]
    target, _, call = line.strip().partition(" = warpgroup_mma_wait(")
    kept = f"{target} = {call.partition('deps=(')[2].partition(',)')[0]}" if call else "pass"
    lines[number] = indent + kept
    module = {"__name__": "mutant"}
    exec(compile("\n".join(lines), "mutant", "exec"), module)
    with pytest.raises((gluon_model.Hazard, gluon_model.Deadlock, AssertionError)):
        run(module, *SHAPES["many tiles"])
        run(module, *SHAPES["more keys"])


def why_not(q=None, **changed) -> str | None:
    q, k, v = (q, q, q) if q is not None else (torch.empty(1, 2, 8, 64, dtype=torch.bfloat16),) * 3
    rules = Rules(None, None, None, None, None, 0, None, 0, 0.125, 0.0, 0.0)._replace(**changed)
    return attention_gluon.why_not_gluon(q, k, v, rules)


def test_who_may_run_it(monkeypatch):
    assert "no sm_90" in why_not()
    monkeypatch.setattr(attention_gluon, "architecture", lambda x: "sm_90")
    assert "LLMKERN_GLUON=1" in why_not()
    monkeypatch.setenv("LLMKERN_GLUON", "1")
    assert why_not() is None
    assert "softcap" in why_not(softcap=3.0)
    assert "window" in why_not(left=4)
    assert "scale" in why_not(scale=-1.0)
    assert "16 bits" in why_not(torch.empty(1, 2, 8, 64))
    assert "128" in why_not(torch.empty(1, 2, 8, 256, dtype=torch.bfloat16))
    packed = torch.empty(1, 8, 3, 2, 36, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    assert "16 bytes" in why_not(packed[1])
    with mock.patch.object(attention_gluon.triton, "__version__", "3.8.0"):
        assert "3.9" in why_not()


def test_explain_says_why():
    from llmkern.ops import use
    from llmkern.ops.explain import explain

    with use("triton"):
        q = torch.empty(1, 2, 8, 64, dtype=torch.bfloat16)
        assert "not the one for sm_90: the GPU is no sm_90" in str(explain("attention", q, q, q))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an sm_90")
class TestOnTheDevice:
    """What the model cannot tell: run on a GPU, before `attention_fwd` may join config.PROVEN."""

    @pytest.fixture(autouse=True)
    def switched_on(self, monkeypatch):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs an sm_90")
        monkeypatch.setenv("LLMKERN_GLUON", "1")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_contract(self, dtype):
        from error_rule import run as run_sample
        from error_rule import violations

        from llmkern.ops import OPS
        from llmkern.ops.op import samples

        for sample in samples(OPS["attention"], dtype, "cuda"):
            got = run_sample(OPS["attention"], sample, backend="triton")
            assert not violations(OPS["attention"], sample, dtype, got), sample.label

    @pytest.mark.parametrize("shape", [(2, 16, 4, 4096, 4096, 128), (1, 3, 3, 777, 1301, 64)])
    def test_long_and_the_same_every_time(self, shape):
        from llmkern import ops

        q, k, v = (t.cuda() for t in qkv(*shape))
        assert why_not(q) is None
        run_once = partial(ops.attention, q, k, v, is_causal=True, causal_align="bottom_right")
        first = run_once()
        expected, _ = reference(q, k, v, k.shape[2] - q.shape[2])
        assert (first.double() - expected).abs().max() < 0.02
        assert all(torch.equal(first, run_once()) for _ in range(30))
