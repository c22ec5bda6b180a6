"""The catalogue: every figure has a source, measured devices come back as they were saved."""

import dataclasses

import pytest

from llmkern.errors import UserError
from llmkern.plan import hardware
from llmkern.plan.hardware import GIB, UNITS, Hardware, find, published, save_measured


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", published())
def test_every_figure_has_a_source(name: str):
    entry = hardware.data()["devices"][name]
    figures = {key for key, _ in UNITS.values() if entry.get(key) is not None}
    assert figures == {key for key in entry["sources"] if entry.get(key) is not None}
    assert set(entry["sources"].values()) <= set(hardware.data()["sources"])


def test_every_source_is_used():
    devices = hardware.data()["devices"].values()
    assert {s for d in devices for s in d["sources"].values()} == set(hardware.data()["sources"])


def test_units():
    a100 = find("a100")
    assert a100.peak() == 312e12 and a100.memory == 80 * GIB and a100.link == 300e9
    assert find("A100 SXM_80GB") is find("a100-sxm-80gb")


def test_dense_rates():
    """The ridges of research on these cards: sparse rates would double them."""
    ridges = {"a100": 153, "h100": 295, "h200": 206, "b200": 281, "mi300x": 247, "rtx-4090": 164}
    for name, flops_per_byte in ridges.items():
        assert find(name).ridge() == pytest.approx(flops_per_byte, rel=0.005), name


def test_unknown_hardware_names_the_nearest(home):
    with pytest.raises(UserError, match=r"hardware is 'h1000', .*h100"):
        find("h1000")
    with pytest.raises(UserError, match="dtype is 'float8', which NVIDIA A100"):
        find("a100").peak("float8")


def test_measured_comes_back(home):
    mine = Hardware(
        "this-machine", "AMD EPYC, 2 cores", {"float32": 2.5e11}, 16 * GIB, 3e10, power=None,
        matmul={"float32": 2e11}, measured={"date": "2026-11-25"}, sources={"tflops": "measured"},
    )  # fmt: skip
    save_measured(dataclasses.replace(mine, bandwidth=1.0))
    save_measured(mine)
    back = find("this-machine")
    assert back.flops["float32"] == pytest.approx(2.5e11) and back.bandwidth == pytest.approx(3e10)
    assert back.matmul["float32"] == pytest.approx(2e11) and back.measured == {"date": "2026-11-25"}
    assert "this-machine" in hardware.catalogue() and "a100-sxm-80gb" in hardware.catalogue()


def test_only_measurements_are_saved(home):
    with pytest.raises(ValueError, match="has no `measured`"):
        save_measured(find("a100"))


def test_broken_file(home):
    path = hardware.measured_file()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(UserError, match="is not a file of measured hardware"):
        find("a100")
