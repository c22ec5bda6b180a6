"""A run that is killed, whenever and however often, ends as one that never was: bit for bit."""

import os
import random
import signal
import time

import pytest
import small_run
import torch
from small_run import call, config, outcome, start, train, wait

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

PARTS = 4  # of a test, for several processes of pytest


@pytest.fixture(autouse=True)
def _one_thread():
    """A forked child has no OpenMP threads to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made = small_run.make_data(folder / "tokens")
    for steps in (1, 2):  # what is imported here no child has to import; the second goes on after the first
        train(config(made, folder / "warm", steps=steps))
    return made


@pytest.fixture
def unbroken(data, tmp_path):
    """How the run ends that nobody kills, and how often it touches the disk."""
    settings = config(data, tmp_path / "unbroken")
    assert call(small_run.count_calls, settings, tmp_path / "calls") == 0
    result = outcome(tmp_path / "unbroken")
    assert [line["step"] for line in result[0] if "loss" in line] == list(range(6))
    assert result[1] == "step-00000006"
    return result, int((tmp_path / "calls").read_text())


def _killed_before_calls(points, data, tmp_path, unbroken):
    for point in points:
        settings = config(data, tmp_path / f"killed-{point}")
        assert call(small_run.train_until, point, settings) == -signal.SIGKILL
        assert call(train, settings) == 0
        assert outcome(tmp_path / f"killed-{point}") == unbroken, f"killed before call {point}"


def test_killed_at_some_writes(data, tmp_path, unbroken):
    result, calls = unbroken
    points = sorted(random.Random(0).sample(range(1, calls + 1), 10))
    _killed_before_calls(points, data, tmp_path, result)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_write(data, tmp_path, unbroken, part):
    result, calls = unbroken
    assert calls >= 100
    _killed_before_calls(range(1 + part, calls + 1, PARTS), data, tmp_path, result)


def _killed_at_random(kills, data, tmp_path, seed, **keys):
    whole = config(data, tmp_path / "whole", **keys)
    begin = time.monotonic()
    assert call(train, whole) == 0
    longest = time.monotonic() - begin
    chance, done, run = random.Random(seed), 0, 0
    while done < kills:
        run += 1
        settings = config(data, tmp_path / f"broken-{run}", **keys)
        code = None
        while code != 0:
            child = start(train, settings)
            time.sleep(chance.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            code = wait(child)
            done += code == -signal.SIGKILL
        assert outcome(tmp_path / f"broken-{run}") == outcome(tmp_path / "whole")


def test_killed_at_random_moments(data, tmp_path):
    _killed_at_random(4, data, tmp_path, 0, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"objective": "masked"}, {"accumulate": 2, "order": "random"}], ids=str)
def test_killed_at_40_random_moments(data, tmp_path, keys):
    _killed_at_random(40, data, tmp_path, 1, steps=30, **keys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(data, tmp_path, number):
    keys = {"save_every": 0, "schedule": "constant"}
    child = start(train, config(data, tmp_path / "run", steps=100_000, **keys))
    _wait_for_step(tmp_path / "run", 1)
    os.kill(child, number)
    assert wait(child) == 128 + number
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step-"))
    lines = small_run.read_log(tmp_path / "run")
    assert steps == 1 + max(line["step"] for line in lines if "loss" in line)
    for name in ("run", "whole"):
        assert call(train, config(data, tmp_path / name, steps=steps + 3, **keys)) == 0
    assert outcome(tmp_path / "run")[:3] == outcome(tmp_path / "whole")[:3]


def _wait_for_step(out, step):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any(line["step"] >= step for line in small_run.read_log(out)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in a minute")


def test_a_second_signal_stops_at_once(data, tmp_path):
    def stuck():
        from llmkern.train import run

        run.Run.save = lambda self: time.sleep(60)
        train(config(data, tmp_path / "run", steps=100_000, save_every=0))

    child = start(stuck)
    _wait_for_step(tmp_path / "run", 1)
    begin = time.monotonic()
    os.kill(child, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    assert wait(child) == -signal.SIGTERM and time.monotonic() - begin < 10


def test_two_processes_do_not_share_a_folder(data, tmp_path):
    child = start(train, config(data, tmp_path / "run", steps=100_000))
    _wait_for_step(tmp_path / "run", 1)
    try:
        with pytest.raises(ValueError, match="in use by another process"):
            train(config(data, tmp_path / "run"))
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)
