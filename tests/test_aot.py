"""Every Triton kernel compiles for GPUs that are not here, without spills and on the tensor cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern.ops import OPS

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
# without the interpreter, which this process may have switched on
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def compile_kernels(*arguments: str) -> None:
    command = [sys.executable, "-m", "benchmarks.aot", "--failed", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_kernel_once():
    same = {"rms_norm", "linear", "rope_inplace", "log_softmax"}  # as layer_norm, ffn, rope and softmax
    compile_kernels(*(name for name in OPS if name not in same), "--once", "--dtype", "bfloat16", "float32")


@pytest.mark.slow
def test_every_case():
    compile_kernels()


def test_planted_faults_are_found():
    """A tile that does not fit the registers is reported."""
    script = (
        "from benchmarks import aot; from llmkern.kernels import config\n"
        "config.ATTENTION_FWD[2, 64] = config.Tile(256, 128, 4, 8)\n"
        "rows = aot.compile_op('sm_80', 'bfloat16', 'attention', once=True)\n"
        "print(*next(row.problems for row in rows if row.kernel == '_forward_kernel'))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert "spills" in result.stdout, result.stdout + result.stderr
