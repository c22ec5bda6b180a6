"""The op table is the one place: what is in it appears in tests, benchmarks and docs by itself."""

import os
import subprocess
import sys
from pathlib import Path

from llmkern.ops import OPS
from llmkern.ops.page import page

ROOT = Path(__file__).parents[2]

NEW_OP = '''
"""An op that no file of the project knows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmkern.ops.op import Make, Op, Sample, register


def square(x: Tensor) -> Tensor:
    """The square of x."""
    return SQUARE.apply(x)


@register
class SQUARE(Op):
    """y = x ∘ x"""

    name = "square"
    family = "square"
    source = "Euclid, Elements, book I, proposition 46"
    gradients = {"x": 0}
    public = staticmethod(square)

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return x * x

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
    def reference_bwd(dy: Tensor, x: Tensor, needs: list[bool]) -> Tensor:
        return 2 * x * dy

    @staticmethod
    def outputs_bwd(dy, x, needs):
        return torch.empty_like(x)

    @staticmethod
    def flops(x):
        return x.numel()

    @staticmethod
    def flops_bwd(dy, x, needs):
        return 2 * x.numel()

    @staticmethod
    def eager(x):
        return torch.square(x)

    @staticmethod
    def samples(make: Make) -> Iterator[Sample]:
        for n in range(1, 9):
            yield Sample(f"{n}x{n}", (make(n, n),), {})

    @staticmethod
    def benchmarks(make: Make) -> Iterator[Sample]:
        for n in (64, 128):
            yield Sample(f"{n}x{n}", (make(n, n),), {})

    @staticmethod
    def draw(make: Make) -> Sample:
        return Sample("random", (make.laid_out(make.size(9), make.size(9)),), {})
'''


def python(folder: Path, *arguments: str) -> str:
    """The output of a Python that finds the new op in `folder`; it must succeed."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_new_op_is_everywhere(tmp_path: Path):
    (tmp_path / "new_op.py").write_text(NEW_OP)
    tests = (
        "complete or can_fail or in_float64 or gradcheck or opcheck or compile or meta or flop or autocast"
    )
    out = python(
        tmp_path, "-m", "pytest", "-p", "new_op",
        "tests/ops", "-k", f"square and ({tests})", "-v", "-p", "no:cacheprovider",
    )  # fmt: skip
    for test in ("test_gradcheck", "test_opcheck", "test_compile_equals_eager", "test_flop_counter"):
        assert f"{test}[square] PASSED" in out
    script = (
        "import torch, new_op; from benchmarks.suite import cases; from llmkern.ops import OPS, page\n"
        "print(page.page(OPS.values()))\n"
        "for case in cases(['square'], 'cpu', [torch.float32], ['fwd+bwd'], False): print(case)"
    )
    out = python(tmp_path, "-c", script)
    assert "## square\n\nThe square of x.\n\n    y = x ∘ x\n" in out
    assert "square 128x128 float32 fwd+bwd" in out
    out = python(tmp_path, "-c", "import new_op; from llmkern.cli import main; main(['info', '--ops'])")
    assert "Euclid" in out


def test_the_page_of_ops_is_current():
    assert (ROOT / "docs/ops.md").read_text() == page(OPS.values()), "run `make docs`"
