"""A sample of each part of the proof, and for each a planted failure of its class that must be seen."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from error_rule import Outcome
from here import GPU, TRITON
from proof import determinism, fuzz, malformed, mutants

import llmkern
from llmkern import ops
from llmkern.ops import OPS
from llmkern.ops.op import Op

HERE = Path(__file__).parent
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
needs_interpreter = pytest.mark.skipif(GPU or not TRITON, reason="runs in Triton's interpreter")


@pytest.fixture(autouse=True)
def _quiet():
    llmkern.set_fallback("silent")
    yield
    llmkern.set_fallback("warn")


@each_op
def test_random_calls(op: Op):
    tally = fuzz.fuzz(op, range(60))
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.forward == 60 and tally.backward == (60 if op.gradients else 0)


@each_op
@needs_interpreter
def test_random_calls_of_triton(op: Op):
    """Fenced: guard pages, NaN between elements, int32 overflow."""
    tally = fuzz.fuzz(op, range(4), "triton", fenced=True)
    assert not tally.bad, "\n".join(tally.bad)


@each_op
def test_a_planted_error_is_seen(op: Op):
    assert any(fuzz.planted(op, seed) for seed in range(3))


def test_a_planted_bias_is_seen():
    pool = fuzz.Pool()
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    toward_zero = torch.from_numpy((exact.float().numpy().view("int32") & -2).view("float32"))
    pool.add(toward_zero.abs(), exact.float().abs(), exact.abs(), 2.0**-24)
    assert pool.bias < -fuzz.POOLED_BIAS and pool.ratio > fuzz.POOLED_FORWARD


@pytest.mark.skipif(not hasattr(os, "fork"), reason="guard pages are for Linux")
def test_a_read_outside_is_seen():
    """A fenced tensor ends the process that reads one element beyond it."""
    script = (
        "import torch, ctypes; from proof.fuzz import _fenced\n"
        "x = _fenced(torch.ones(5)); ctypes.string_at(x.data_ptr(), 20); print('inside', flush=True)\n"
        "ctypes.string_at(x.data_ptr(), 21); print('outside')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert done.returncode < 0 and done.stdout.strip() == "inside"


def test_fences_keep_values_and_strides():
    x = torch.arange(24.0).view(4, 6)[::2, 1:5].t()
    fenced = fuzz._fenced(x)
    assert torch.equal(fenced, x) and fenced.stride() == x.stride()
    assert fenced.as_strided((2,), (1,)).isnan().tolist() == [False, False]
    assert fenced.as_strided((1,), (1,), fenced.storage_offset() + 4).isnan().all()


@each_op
def test_determinism(op: Op):
    row = determinism.row(op, repeats=2, cases=2)
    assert row.good, row


def test_a_planted_difference_is_seen():
    same = Outcome([torch.ones(3)], [torch.tensor([1.0, float("nan")])])
    other = Outcome([torch.ones(3)], [torch.tensor([1.0 + 2**-23, float("nan")])])
    assert determinism.equal(same, same) and not determinism.equal(same, other)


def test_every_mutant_stands_once():
    """Each names a line that is there, differs from it, and is Python where it was; 20 and more a family."""
    for mutant in mutants.mutants():
        text = (mutants.ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.family}: {mutant.old!r} in {mutant.file}"
        assert mutant.old != mutant.new
        if mutant.file.endswith(".py"):
            compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert min(Counter(mutant.family for mutant in mutants.mutants()).values()) >= 20


def test_a_mutant_is_killed_and_a_comment_is_not(tmp_path):
    tests = ["tests/ops/test_softmax.py", "-k", "not triton and not compile"]
    sound = "    return x - x.amax(-1, keepdim=True) if x.shape[1] else x\n"
    broken = sound.replace("amax", "amin")
    made = [
        mutants.Mutant("softmax", "llmkern/ops/softmax.py", sound, new, tests)
        for new in (broken, "    # the same\n" + sound)
    ]
    verdicts = {v.mutant.new: v.killed for v in mutants.judge_all(made)}
    assert verdicts == {broken: True, "    # the same\n" + sound: False}, verdicts


def test_reference_is_not_the_kernel():
    """What is fuzzed is the kernel: the reference is asked only for the truth."""
    with ops.use("cpp"):
        assert "C++" in str(llmkern.explain("softmax", torch.ones(2, 3)))


@pytest.mark.parametrize("kind", malformed.KINDS, ids=lambda kind: kind.name)
def test_harmed_files(kind: malformed.Kind):
    tally = malformed.try_kind(kind, range(60))
    assert tally.tried == 60 and not tally.bad, "\n".join(tally.bad)


def test_a_reader_that_fails_is_seen():
    """One that lets Python's exception out, and one that accepts whatever it is given."""
    toml = next(kind for kind in malformed.KINDS if kind.name == "config, TOML")
    trusting = malformed.Kind("trusting", toml.write, lambda folder: folder, sealed=True)
    careless = malformed.Kind(
        "careless", toml.write, lambda folder: (folder / "c.toml").read_text().index("steps")
    )
    assert len(malformed.try_kind(trusting, range(5)).bad) == 5
    assert malformed.try_kind(careless, range(40)).bad
