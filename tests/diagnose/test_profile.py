"""The machine's profile: which wall, how long, kept and read again."""

import dataclasses

import pytest
import torch

from llmkern.diagnose import keep
from llmkern.diagnose.calibrate import PROBES, calibrate
from llmkern.diagnose.predict import step_seconds
from llmkern.diagnose.profile import load
from llmkern.diagnose.trace import Call
from llmkern.plan import hardware


def call(flops: float, moved: float, **more) -> Call:
    return Call("aten.mm", "", "forward", torch.float32, flops, moved, flops, **more)


def test_walls(profile):
    assert profile.wall(call(1e9, 1e6)) == "compute"  # 10 ms against 0.1
    assert profile.wall(call(1e6, 1e8)) == "memory"
    assert profile.wall(call(1e3, 1e3)) == "launch"
    assert profile.wall(call(1e9, 1e6, collective=True)) == "communication"


def test_seconds_follow_the_part_of_the_ceiling_measured_at_that_size(profile):
    profile.points = {"float32": {"aten.mm": [(1e-4, 0.25), (1e-1, 0.8)]}}
    assert profile.seconds(call(1e7, 0)) == pytest.approx(1e-4 / 0.25, rel=1e-6)
    assert profile.seconds(call(1e10, 0)) == pytest.approx(1e-1 / 0.8, rel=1e-6)
    assert 0.25 < 3e-3 / profile.seconds(call(3e8, 0)) < 0.8
    assert step_seconds([call(1e7, 0)] * 3, profile) == pytest.approx(3 * (4e-4 + profile.launch))


def test_sizes_far_from_what_was_measured_follow_others(profile):
    scalars = [(7e-11, 1e-6)] * 3
    profile.points = {"float32": {"aten.div": scalars, "aten.add": [(1e-2, 0.5)], "aten.mm": [(1e-2, 0.9)]}}
    large = dataclasses.replace(call(0, 1e8), op="aten.div")
    assert profile.seconds(large) == pytest.approx(1e-2 / 0.5, rel=0.01)
    assert profile.seconds(dataclasses.replace(large, op="aten.bmm")) == pytest.approx(1e-2 / 0.9, rel=0.01)
    assert profile.seconds(dataclasses.replace(large, bytes=0.7)) == pytest.approx(7e-11 / 1e-6, rel=0.01)
    profile.points = {"float32": {"aten.add": [(1e-2, 0.5)]}}
    assert profile.seconds(large) == pytest.approx(1e-2 / 0.5, rel=0.01)


def test_memory_from_the_system_costs_extra(profile):
    profile.fresh = 1e-9
    assert profile.seconds(call(1e9, 0, fresh=1e6)) - profile.seconds(call(1e9, 0)) == pytest.approx(1e-3)


def test_kept_and_read_again(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load(profile.about, "cpu") is None
    profile.points = {"float32": {"aten.mm": [(0.1, 0.5)]}}
    path = profile.save()
    assert load(profile.about, "cpu") == profile
    assert load({**profile.about, "threads": 999}, "cpu") is None
    path.write_text("{")
    assert load(profile.about, "cpu") is None


def test_plan_knows_the_machine(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    keep.save(profile)
    found = hardware.find(keep.as_hardware(profile).name)
    assert found.flops["float32"] == pytest.approx(1e11) and found.bandwidth == pytest.approx(1e10)
    assert found.measured["date"] == profile.about["date"]


def test_calibration_measures_every_op_of_its_models(profile):
    calibrate(profile, torch.float32, PROBES[:1])
    points = profile.points["float32"]
    assert {"aten.addmm", "aten._fused_adamw_", "llmkern.attention_fwd", "llmkern.ffn_bwd"} <= set(points)
    assert all(least > 0 and part > 0 for found in points.values() for least, part in found)
    assert 0 < profile.launch < 0.05
