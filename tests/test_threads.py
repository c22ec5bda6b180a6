"""The kernels and torch share one pool of threads: what it obeys, and what must not hang."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from llmkern import _cpu, ops

pytestmark = pytest.mark.skipif(isinstance(_cpu.load(_cpu.best()), str), reason="no C++ kernels")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

SETUP = """
import os, signal, torch
from llmkern import ops
x, w = torch.randn(300, 128), torch.randn(256, 128)
def run():  # bytes: torch's own kernels may not run in a forked child
    y = ops.linear(x, w)
    return y.numpy().tobytes() + ops.layer_norm(y, (256,)).numpy().tobytes()
"""


def run_script(script: str) -> str:
    """What a fresh interpreter prints; a process that hangs is ended by its own alarm."""
    done = subprocess.run([sys.executable, "-c", SETUP + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux
@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_threads_as_torch_is_told(count: int):
    """Threads that the first kernel starts: the calling one is there already."""
    found = run_script(f"""
torch.set_num_threads({count})
before = len(os.listdir("/proc/self/task"))
run()
print(len(os.listdir("/proc/self/task")) - before)
""")
    assert int(found) == count - 1


@linux
def test_a_forked_child_computes_the_same():
    """GNU's runtime waits for ever for threads that fork did not copy; torch's own kernels do so there."""
    found = run_script("""
torch.set_num_threads(2)
expected = run()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if run() == expected else 1)
print(os.waitpid(child, 0)[1])
""")
    assert found == "0"


def test_callers_on_several_threads():
    x, w = torch.randn(300, 128), torch.randn(256, 128)
    expected, wrong = ops.linear(x, w), []

    def work() -> None:
        wrong.extend(i for i in range(20) if not torch.equal(ops.linear(x, w), expected))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_more_threads_than_work():
    """A loop of one iteration, and one of fewer iterations than threads."""
    threads = torch.get_num_threads()
    w = torch.randn(16, 24)
    try:
        for rows in (0, 1, 5, 40):
            x = torch.randn(rows, 24)
            torch.set_num_threads(1)
            expected = ops.linear(x, w)
            torch.set_num_threads(7)
            assert torch.equal(ops.linear(x, w), expected)
    finally:
        torch.set_num_threads(threads)


def test_sources_use_no_other_threads():
    """OpenMP stays in threads.h, so that all of this holds for every kernel."""
    sources = Path(__file__).parent.parent.glob("csrc/*")
    users = {p.name for p in sources if "omp " in (text := p.read_text()) or "std::thread" in text}
    assert users == {"threads.h"}
