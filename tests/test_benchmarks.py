"""The benchmarks follow the op table, and their results say what they must."""

import json
import sys
from pathlib import Path

import pytest
import torch

from llmkern.ops import OPS
from llmkern.ops.op import Make, Op, Sample, register

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def main():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from benchmarks import __main__ as program

        yield program.main


@pytest.fixture(scope="module")
def doubled():
    """An op that only this file knows."""

    class DOUBLED(Op):
        """y = 2 x"""

        name, family, source = "doubled", "doubled", "this test"
        gradients = {"x": 0}

        @staticmethod
        def reference(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def outputs(x):
            return torch.empty_like(x)

        @staticmethod
        def save(args, outs):
            return args

        @staticmethod
        def replay(x):
            return (x,)

        @staticmethod
        def reference_bwd(dy: torch.Tensor, x: torch.Tensor, needs: list[bool]) -> torch.Tensor:
            return 2 * dy

        @staticmethod
        def outputs_bwd(dy, x, needs):
            return torch.empty_like(x)

        @staticmethod
        def flops(x):
            return x.numel()

        @staticmethod
        def flops_bwd(dy, x, needs):
            return dy.numel()

        @staticmethod
        def public(x):
            return OPS["doubled"].apply(x)

        @staticmethod
        def eager(x):
            return x * 2

        @staticmethod
        def benchmarks(make: Make):
            yield Sample("64x32", (make(64, 32),), {})
            yield Sample("128x32", (make(128, 32),), {})

    yield register(DOUBLED)
    del OPS["doubled"]


@pytest.fixture(scope="module")
def result(main, doubled, tmp_path_factory):
    """The JSON of a run of a new op, nothing else being told about it."""
    out = tmp_path_factory.mktemp("results")
    words = "doubled --device cpu --dtype float32 --peers llmkern,eager,reference --quick --out"
    assert main([*words.split(), str(out)]) == 0
    return json.loads(next(out.glob("*.json")).read_text())


def test_new_op_appears(result):
    rows = result["rows"]
    found = {(row["op"], row["sample"], row["half"], row["peer"]) for row in rows}
    halves, peers = ("fwd", "fwd+bwd"), ("llmkern", "eager", "reference")
    assert found == {("doubled", "64x32", half, peer) for half in halves for peer in peers}
    assert not any(row["error"] for row in rows)
    for row in rows:
        assert row["median_s"] > 0 and row["gflops"] > 0 and row["gbps"] > 0 and row["ceiling"] > 0
        assert row["speedup"] == 1 if row["peer"] == "llmkern" else row["speedup"] > 0


def test_work_is_counted(result):
    for row in result["rows"]:
        elements = 64 * 32 * (1 if row["half"] == "fwd" else 2)
        tensors = 2 if row["half"] == "fwd" else 5  # x, y; then dy, x, dx
        assert row["gflops"] * row["median_s"] * 1e9 == pytest.approx(elements)
        assert row["gbps"] * row["median_s"] * 1e9 == pytest.approx(tensors * 64 * 32 * 4)


def test_fallback_is_told(result):
    ours = next(row for row in result["rows"] if row["peer"] == "llmkern")
    assert ours["backend"] == "reference"
    assert ours["reasons"]


def test_result_says_where(result):
    machine, ceilings = result["machine"], result["ceilings"]
    assert {"device", "cores", "threads", "python", "torch", "llmkern", "date", "commit"} <= machine.keys()
    assert all(rate > 0 for rates in ceilings["flops"].values() for rate in rates.values())
    assert all(rate > 0 for rates in ceilings["bandwidth"].values() for rate in rates.values())
    assert ROOT.as_posix() not in json.dumps(result)


def test_failure_of_a_peer_is_a_row(main, doubled, tmp_path, monkeypatch, capsys):
    def broken(x):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(type(doubled), "eager", staticmethod(broken))
    words = "doubled --device cpu --dtype float32 --half fwd --peers llmkern,eager --quick --out"
    assert main([*words.split(), str(tmp_path)]) == 0
    assert "eager failed on doubled 64x32 float32 fwd: RuntimeError: no such luck" in capsys.readouterr().out


def test_wrong_words(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["atention"])
    assert stop.value.code == 2
    assert "OP is 'atention', expected one of attention, " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_command_without_gpu(main, capsys):
    from benchmarks import gpu

    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "benchmarks.gpu" in sys.modules


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_a_bound(op: Op, main):
    from benchmarks.peers import examine
    from llmkern.ceilings import Ceilings

    ceilings = Ceilings({"float32": {"fma": 1e11}}, {2**19: {"copy": 1e10}})
    half = "fwd+bwd" if op.gradients else "fwd"
    bound, choices = examine(op, next(op.samples(Make(torch.float32))), half, ceilings)
    assert bound.seconds > 0 and len(choices) == 1 + bool(op.gradients)
