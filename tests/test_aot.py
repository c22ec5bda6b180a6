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


def output(script: str) -> str:
    command = [sys.executable, "-c", "from benchmarks import aot_compile, aot_table\n" + script]
    result = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    return result.stdout + result.stderr


def test_each_kernel_once():
    """On the GPU that most kernels are shaped for; `make prove` has the others."""
    same = {"rms_norm", "linear", "rope_inplace", "log_softmax"}  # as layer_norm, ffn, rope and softmax
    ops = [name for name in OPS if name not in same]
    compile_kernels(*ops, "--once", "--dtype", "bfloat16", "--target", "sm_90")


@pytest.mark.parametrize(
    "target, dtype, ops", [("gfx942", "bfloat16", ["linear"]), ("sm_80", "float32", ["attention", "linear"])]
)
def test_other_gpus(target, dtype, ops):
    compile_kernels(*ops, "--once", "--dtype", dtype, "--target", target)


@pytest.mark.slow
def test_each_kernel_once_for_every_gpu():
    compile_kernels("--once", "--all")


@pytest.mark.slow
def test_every_case():
    compile_kernels("--dtype", "bfloat16", "float32")


def test_planted_spills_are_found():
    """A tile that does not fit the registers is reported."""
    found = output(
        "from llmkern.kernels import tiles\n"
        "tiles.TABLE['attention_fwd', 'any', 2, '64'] = tiles.Tile(256, 128, 0, 4, 8)\n"
        "rows = aot_compile.compile_op('sm_80', 'bfloat16', 'attention', once=True)\n"
        "print(*next(row.problems for row in rows if row.kernel == '_forward_kernel'))"
    )
    assert "spills" in found, found


def test_growth_and_an_old_table_are_named():
    """A kernel that takes more than its row says, one that takes much less, and one that has no row."""
    found = output(
        "rows = aot_compile.compile_op('sm_90', 'bfloat16', 'dropout', once=True)\n"
        "table = {aot_table.key(row): aot_table.facts(row) for row in rows}\n"
        "assert not [*aot_table.differences(rows[0], table)]\n"
        "table[aot_table.key(rows[0])] |= {\n"
        "    'registers': '8', 'instructions': '9', 'wide': '1.5', 'shared': '999'}\n"
        "print(*aot_table.differences(rows[0], table))\n"
        "print(*aot_table.differences(rows[0], {('another',): {}}))"
    )
    assert "the table has 8" in found and "the table has 9" in found and "has 1.5" in found, found
    assert "the table has 999: renew" in found and "has no row for it: renew" in found, found


def test_planted_atomics_and_narrow_accesses_are_found():
    """The reader of assembly knows what it looks for."""
    found = output(
        "from benchmarks import aot_code as code\n"
        "text = '''\n        /*0010*/      @!P0 LDG.E.128.CONSTANT R4, [R2] ;\n"
        "        /*0020*/                   STG.E.U16 [R2], R4 ;\n"
        "        /*0030*/                   REDG.E.ADD.F32 [R2], R4 ;'''\n"
        "ops = code.opcodes(text)\n"
        "print(ops, [code._sass_bytes(op) for op in ops], [bool(code.ATOMIC.match(op)) for op in ops],\n"
        "      code._amd_bytes('buffer_load_dwordx4'), code._amd_bytes('global_store_short_d16_hi'),\n"
        "      bool(code.ATOMIC.match('global_atomic_add_f32')))"
    )
    expected = (
        "['LDG.E.128.CONSTANT', 'STG.E.U16', 'REDG.E.ADD.F32'] [16, 2, 0] [False, False, True] 16 2 True"
    )
    assert expected in found, found
