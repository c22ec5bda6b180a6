"""Fewer bytes between replicas: outer steps follow their formula, hooks learn nearly the same."""

import exact
import launch
import pytest
import small_run
import torch
from exact import gpt, llama, whole
from launch import DYING, torchrun

from llmkern.parallel import Parallel, Sizes, start
from llmkern.parallel.outer import Outer
from llmkern.train import checkpoint
from llmkern.train.log import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
STEPS = {"steps": 6}
DILOCO, AVERAGES = Outer(2), Outer(3, learning_rate=1.0, momentum=0.0)


def apart(sizes: Sizes, outer: Outer) -> None:
    """Losses, norms and the last weights, against replicas in one process."""
    model = llama()  # it has no biases of keys, whose gradients are nothing but rounding
    parallel = Parallel(model, start(sizes, "cpu", timeout=60), outer=outer)
    records = exact.train(model, STEPS, parallel).records
    weights = {
        name: whole(p.detach(), parallel.packed.get(name)) for name, p in parallel.parameters().items()
    }
    expected = exact.train_apart(llama, STEPS, outer, sizes.dp)
    exact.compare(f"{outer} on {sizes}", exact.Course(records, [weights]), expected, rtol=1e-5)


def course(saver: str) -> tuple[list[float], float]:
    """Losses, and bytes sent."""
    from llmkern.parallel.traffic import Traffic

    model = gpt()
    parallel = Parallel(model, start(Sizes(dp=2), "cpu", timeout=60), saver=saver)
    with Traffic() as traffic:
        losses = [loss for loss, _ in exact.train(model, {"steps": 16}, parallel).records]
    return losses, sum(traffic.sent.values())


def hooks() -> None:
    losses, sent = course("none")
    half, halves = course("bf16")
    assert 0.5 < halves / sent < 0.52
    assert half != losses and half == pytest.approx(losses, rel=1e-3)
    low, few = course("powersgd")  # the first 10 steps whole
    assert low[:10] == losses[:10]
    assert few / sent < 0.8
    assert low[10:] != losses[10:] and low == pytest.approx(losses, rel=0.02)


def both() -> None:
    apart(Sizes(dp=2), DILOCO)
    apart(Sizes(dp=2), AVERAGES)
    hooks()


def islands() -> None:
    apart(Sizes(dp=2, fsdp=2), DILOCO)
    apart(Sizes(dp=2, tp=2), DILOCO)
    apart(Sizes(dp=2, pp=2), DILOCO)
    apart(Sizes(dp=2, cp=2), DILOCO)


def test_two_processes():
    exact.processes(2, both)


@pytest.mark.slow
def test_replicas_of_two_processes():
    exact.processes(4, islands)


KEYS = ("--outer-every", "3", "--steps", "6", "--save-every", "1")


def _run(out, data, mesh: str, *keys: str, kill: tuple = (), processes: int = 2) -> str:
    program = launch.train(data, out, "--parallel", mesh, *KEYS, *keys)
    start = [str(DYING), *kill, *program] if kill else ["-m", "llmkern", *program]
    code, said = torchrun(processes, start, "--max-restarts", "1" if kill else "0")
    assert code == 0, said
    return said


def _outcome(out) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(out)]
    last = checkpoint.load(out)
    return lines, last.model_tensors() | last.optimizer_tensors()


@pytest.mark.slow
@pytest.mark.parametrize("mesh, processes", [("dp=2", 2), ("dp=2,fsdp=2", 4)])
def test_killed_between_outer_steps(mesh, processes, tmp_path):
    """Replicas differ then; each finds its own weights and moments again."""
    data = small_run.make_data(tmp_path / "tokens")
    _run(tmp_path / "whole", data, mesh, processes=processes)
    said = _run(tmp_path / "cut", data, mesh, kill=("1", "step", "6"), processes=processes)
    assert "goes on after step 5" in said
    (lines, tensors), (expected_lines, expected) = _outcome(tmp_path / "cut"), _outcome(tmp_path / "whole")
    assert lines == expected_lines
    assert tensors.keys() == expected.keys()
    assert all(t.equal(expected[name]) for name, t in tensors.items())


@pytest.mark.slow
def test_more_replicas_go_on(tmp_path):
    data = small_run.make_data(tmp_path / "tokens")
    _run(tmp_path / "run", data, "dp=2")
    said = _run(tmp_path / "run", data, "dp=4", "--steps", "9", processes=4)
    assert "goes on after step 6" in said
    assert checkpoint.load(tmp_path / "run").replicas == 4
