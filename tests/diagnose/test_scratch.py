"""What `scratch` says of a C++ kernel is what its threads hold after it ran."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch

from llmkern import _cpu, ops
from llmkern.diagnose import Workload, predict
from llmkern.models import GPT, GPTConfig
from llmkern.ops import memory

pytestmark = pytest.mark.skipif(isinstance(_cpu.load(_cpu.best()), str), reason="no C++ kernels here")

SCRIPT = """
import json, sys, torch
from llmkern import ops
from llmkern.diagnose.trace import Tracer
from llmkern.ops import memory

def x(*shape):
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)

case, dtype = sys.argv[1], getattr(torch, sys.argv[2])
works = {
    "ffn": lambda: ops.ffn(x(4096, 256), x(1024, 256), x(1024), x(256, 1024), x(256)),
    "recomputed": lambda: ops.ffn(
        x(1500, 128), x(512, 128), None, x(128, 512), None, "swiglu", weight_gate=x(512, 128), recompute=True
    ),
    "linear": lambda: ops.linear(x(2048, 256), x(1024, 256)),
    "loss": lambda: ops.linear_cross_entropy(
        x(1600, 128), x(8000, 128), torch.zeros(1600, dtype=torch.int64)
    ),
    "losses": lambda: ops.linear_cross_entropy(
        x(2048, 128), x(8192, 128), torch.zeros(2048, dtype=torch.int64), reduction="none"
    ),
}
with Tracer(torch.nn.Module(), "cpu") as tracer:
    tracer.phase = "forward"
    out = works[case]()
    large = memory.cached_bytes()  # what was too large for a thread to keep
    tracer.phase = "backward"
    out.sum().backward()
print(json.dumps([tracer.scratch, large + memory.scratch_bytes()]))
"""


@pytest.mark.parametrize(
    "case, dtype",
    [("ffn", "float32"), ("recomputed", "bfloat16"), ("linear", "float32"), ("loss", "float32"),
     ("losses", "bfloat16")],
)  # fmt: skip
def test_it_is_what_threads_hold(case, dtype):
    command = [sys.executable, "-c", SCRIPT, case, dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, held = json.loads(done.stdout)
    assert 0.6 * held < said < 1.3 * held, (said, held)


def test_it_is_a_part_of_a_predicted_step():
    model = GPT(GPTConfig(64, 64, 1, 2, 64))
    parts = predict(Workload(model, torch.zeros(32, 64, dtype=torch.int64))).parts
    assert parts["scratch"] > 2 * 2048 * 256 * 4  # h and its gradient, a chunk of rows


def test_a_thread_that_ends_holds_nothing():
    held = []

    def work():
        ops.linear(torch.zeros(2048, 256), torch.zeros(1024, 256))
        held.append(memory.scratch_bytes())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool's threads do not end
    try:
        before = memory.scratch_bytes()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    end = time.monotonic() + 5  # join returns before the system's thread has ended
    while memory.scratch_bytes() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert held[0] > before == memory.scratch_bytes()
