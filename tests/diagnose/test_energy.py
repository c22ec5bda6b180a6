"""Joules from counters, or why there are none."""

from pathlib import Path

from llmkern.diagnose import energy


def _zone(root: Path, name: str, joules: float, limit: float = 1000.0) -> Path:
    zone = root / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(str(int(joules * 1e6)))
    (zone / "max_energy_range_uj").write_text(str(int(limit * 1e6)))
    return zone


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    _zone(tmp_path, "intel-rapl:0", 10.0)
    _zone(tmp_path, "intel-rapl:1", 990.0)
    _zone(tmp_path, "intel-rapl:0:0", 5.0)
    read, _ = energy._rapl(tmp_path)
    assert read() == 0
    _zone(tmp_path, "intel-rapl:0", 12.0)
    _zone(tmp_path, "intel-rapl:0:0", 500.0)
    assert abs(read() - 2.0) < 1e-9
    _zone(tmp_path, "intel-rapl:1", 3.0)  # its counter began again at 1000
    assert abs(read() - 15.0) < 1e-3


def test_without_a_counter_the_reason_is_told(tmp_path):
    assert "no RAPL counter" in energy._rapl(tmp_path)


def test_joules_of_a_step(monkeypatch):
    done = []
    monkeypatch.setattr(energy, "WINDOW", 0.0001)
    monkeypatch.setattr(energy, "_rapl", lambda: (lambda: 7.0 * len(done), "a counter"))
    found = energy.measure(lambda: done.append(1), "cpu")
    assert found.joules == 7.0 and found.source.startswith("a counter, mean of")
