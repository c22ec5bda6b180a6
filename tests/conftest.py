"""Without a GPU the Triton kernels run in Triton's interpreter, with bfloat16 mended."""

import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: a thread that waits must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads OpenMP

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside the tests
sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/
import torch
from here import GPU, TRITON

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ.pop("PYTHONSAFEPATH", None)  # processes that tests start name their own folder
if TRITON and not GPU:
    import triton_interpreter

    triton_interpreter.install()

import llmkern
from llmkern import _cpu


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="measure models, plain and swapped, for the docs")


def pytest_report_header() -> list[str]:
    """Which kernels this run tests."""
    return [f"llmkern {llmkern.__version__}, torch {torch.__version__}, backends: {', '.join(backends())}"]


def backends() -> list[str]:
    """The fast backends of this machine: every instruction set it has, and Triton."""
    sets = [f"cpp:{isa}" for isa in _cpu.INSTRUCTION_SETS if not isinstance(_cpu.load(isa), str)]
    return sets + (["triton"] if TRITON else [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marks = {"triton": [pytest.mark.gpu] if GPU else []}
        params = [pytest.param(b, marks=marks.get(b, [])) for b in backends()]
        metafunc.parametrize("backend", params)


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "triton" and GPU else "cpu"


@pytest.fixture
def strict():
    """A fallback to the reference is an error: what runs is what is tested."""
    llmkern.set_fallback("error")
    yield
    llmkern.set_fallback("warn")


@pytest.fixture
def silent():
    """Which backend runs is not the point."""
    llmkern.set_fallback("silent")
    yield
    llmkern.set_fallback("warn")
