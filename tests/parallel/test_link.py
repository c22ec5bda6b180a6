"""Two machines, as two network namespaces with one link, which is cut and restored while they train."""

import os
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
import small_run
import torch

from llmkern.train import checkpoint
from llmkern.train.log import read_log

STEPS = ("--parallel", "fsdp=2", "--steps", "60", "--timeout", "8")


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def link():
    """Names of two namespaces, at 10.77.0.1 and 10.77.0.2."""
    names = [f"llmkern{os.getpid()}{side}" for side in "ab"]
    made = hasattr(os, "geteuid") and os.geteuid() == 0 and all(ip("netns", "add", name) for name in names)
    try:
        ends = "va", "netns", names[0], "type", "veth", "peer", "vb", "netns", names[1]
        if not made or not ip("link", "add", *ends):
            pytest.skip("network namespaces are not permitted here")
        for number, (name, device) in enumerate(zip(names, ("va", "vb")), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def node(names: list[str], rank: int, program: list[str], log: Path) -> subprocess.Popen:
    address = f"10.77.0.{rank + 1}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "cut"]
    rendezvous += ["--rdzv-conf", f"is_host={int(rank == 0)}", "--local-addr", address]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command = ["ip", "netns", "exec", names[rank], *torchrun, *rendezvous, "--max-restarts", "5", *program]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": ("va", "vb")[rank]}
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for_step(out: Path, step: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(line.get("step", 0) >= step for line in read_log(out)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not done within {seconds} s")


@pytest.mark.slow
def test_a_link_that_is_cut_and_restored(link, tmp_path):
    data = small_run.make_data(tmp_path / "tokens")
    out, logs = tmp_path / "cut", [tmp_path / "0.log", tmp_path / "1.log"]
    program = ["-m", "llmkern", *launch.train(data, out, *STEPS)]
    nodes = [node(link, rank, program, logs[rank]) for rank in (0, 1)]
    try:
        wait_for_step(out, 4, 300)
        ip("-n", link[0], "link", "set", "va", "down")
        time.sleep(12)  # longer than the timeout of an exchange
        ip("-n", link[0], "link", "set", "va", "up")
        codes = [process.wait(timeout=500) for process in nodes]
    finally:
        for process in nodes:
            launch.kill(process)
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], said
    assert "did not end" in said
    whole = tmp_path / "whole"
    code, told = launch.torchrun(2, ["-m", "llmkern", *launch.train(data, whole, *STEPS)])
    assert code == 0, told
    got, expected = (checkpoint.load(path).model_tensors() for path in (out, whole))
    assert all(torch.equal(got[name], t) for name, t in expected.items())
