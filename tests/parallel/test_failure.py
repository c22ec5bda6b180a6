"""What happens when processes die, or are too many or too few."""

import socket
from pathlib import Path

import launch
import pytest
import small_run
import torch
from launch import DYING, torchrun

from llmkern.errors import UserError
from llmkern.parallel.mesh import Sizes, launched, start
from llmkern.train import checkpoint
from llmkern.train.config import RunConfig
from llmkern.train.log import read_log
from llmkern.train.team import team_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
SHAPE = {"heads": 4, "key heads": 2, "inner width": 64, "layers": 2, "vocab_size": 33, "window": 0}
# who dies, at which call: before step 4; before its part of the second checkpoint; before that has its name
MOMENTS = {"step": (1, 4), "part": (1, 2), "name": (0, 2)}


def outcome(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Lines of the log without times, and weights and moments at the end."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(out)]
    last = checkpoint.load(out)
    return lines, last.model_tensors() | last.optimizer_tensors()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_run.make_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    arguments = launch.train(data, out, "--parallel", "fsdp=2", "--steps", "6")
    code, said = torchrun(2, ["-m", "llmkern", *arguments])
    assert code == 0, said
    return outcome(out)


def _killed(moment: str, data, out, unbroken) -> None:
    rank, call = MOMENTS[moment]
    arguments = launch.train(data, out, "--parallel", "fsdp=2", "--steps", "6")
    program = [str(DYING), str(rank), moment, str(call), *arguments]
    code, said = torchrun(2, program, "--max-restarts", "1")
    assert code == 0, said
    assert "goes on after step" in said
    lines, tensors = outcome(out)
    assert lines == unbroken[0]
    assert tensors.keys() == unbroken[1].keys()
    assert all(t.equal(unbroken[1][name]) for name, t in tensors.items())


def test_killed_while_a_checkpoint_is_written(data, tmp_path, unbroken):
    _killed("part", data, tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "name"])
def test_killed_at_other_moments(moment, data, tmp_path, unbroken):
    _killed(moment, data, tmp_path, unbroken)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(data, tmp_path):
    arguments = launch.train(data, tmp_path, "--parallel", "fsdp=2", "--steps", "6", "--timeout", "6")
    code, said = torchrun(2, [str(DYING), "1", "hang", "3", *arguments])
    assert code != 0
    assert "rank 0 of 2: all_reduce in step 2 did not end, nothing was heard of rank 1" in said


@pytest.mark.slow
def test_a_process_that_is_late_finds_the_files_of_a_checkpoint(data, tmp_path):
    arguments = launch.train(data, tmp_path, "--parallel", "dp=2", "--steps", "2")
    code, said = torchrun(2, [str(DYING), "1", "late", "1", *arguments])
    assert code == 0, said


@pytest.mark.slow
def test_other_numbers_of_processes_go_on(data, tmp_path):
    """Two, then one, then other meshes: the same as one alone, but for rounding."""
    keys = ("--dropout", "0", "--schedule", "constant")
    runs = [
        (2, "fsdp=2", 2),
        (1, "", 4),
        (4, "tp=2,fsdp=2", 6),
        (2, "tp=2", 8),
        (2, "pp=2", 10),
        (2, "cp=2", 12),
    ]
    for processes, mesh, steps in runs:
        arguments = launch.train(data, tmp_path / "run", *keys, "--parallel", mesh, "--steps", str(steps))
        program = ["-m", "llmkern", *arguments]
        code, said = torchrun(processes, program) if mesh else launch.single(arguments)
        assert code == 0, said
    code, said = launch.single(launch.train(data, tmp_path / "whole", *keys, "--steps", "12"))
    assert code == 0, said
    got, expected = (checkpoint.load(tmp_path / name).model_tensors() for name in ("run", "whole"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text, says",
    [
        ("dp=2,pd=2", "'pd' is unknown"),
        ("dp=2,dp=2", "'dp' is twice"),
        ("tp=two", "tp is 'two', expected a whole number"),
        ("fsdp=0", "fsdp is '0', expected a whole number of at least 1"),
        ("fsdp=3", "a mesh of 1 x 1 x 3 x 1 x 1 = 3 processes"),
        ("fsdp=8", "dp x fsdp is 8, which does not divide batch_size 4"),
        ("tp=8", "tp is 8, which does not divide heads 4"),
        ("tp=4", "tp is 4, which does not divide key heads 2"),
        ("tp=2,fsdp=2", "tp is 2, which does not divide vocab_size 33"),
        ("cp=8", "2 cp is 16, which does not divide block_size 24"),
        ("pp=4", "pp is 4, expected at most the 2 layers"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(text, says):
    with pytest.raises(UserError, match=says) as error:
        sizes = Sizes.parse(text)
        sizes.check(4 if text == "fsdp=3" else sizes.world, 4, 24, SHAPE)
    assert "\n" not in str(error.value)


def test_a_launcher_is_needed(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK is not set; start it with `torchrun"):
        launched()
    for name, value in {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK is '2' and WORLD_SIZE '2'"):
        launched()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "many")
    with pytest.raises(UserError, match="MASTER_PORT is 'many', expected a number"):
        launched()


def test_who_meets_nobody_says_so(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)
    says = f"rank 1 of 2 did not meet the others at 127.0.0.1:{port} within 1 s"
    with pytest.raises(UserError, match=says) as error:
        start(Sizes(dp=2), "cpu", timeout=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"saver": "bf16"}, "saver is bf16, and there are no replicas; give parallel dp=N too, or none"),
        ({"outer_every": 2}, "outer_every is 2, and there are no replicas"),
        ({"parallel": "fsdp=2", "saver": "bf16"}, "saver is bf16 and parallel fsdp=2: expected dp alone"),
        ({"parallel": "dp=2", "saver": "bf16", "outer_every": 2}, "saver is bf16 and outer_every 2"),
        ({"parallel": "dp=2", "outer_every": 4}, "outer_every is 4, which does not divide steps 6"),
    ],
)
def test_savers_that_do_not_fit(keys, says, monkeypatch):
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        team_of(RunConfig(data="none", steps=6, **keys))
