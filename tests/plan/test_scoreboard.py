"""The planner keeps what `python -m benchmarks.plan` promises."""

import pytest

from benchmarks import plan_rows
from benchmarks.plan import main
from llmkern.plan import record, step

GROUPS = {group.title: group for group in plan_rows.groups()}
MAY_MISS = {"Peak memory of Llama 3.1 under torchtitan": 3}  # explained below its table


@pytest.mark.parametrize("title", [t for t, g in GROUPS.items() if g.target is not None])
def test_targets(title: str):
    group = GROUPS[title]
    assert len(group.missed) <= MAY_MISS.get(title, 0), group.missed
    assert group.met or title in MAY_MISS


def test_iteration_times():
    """Calculon's mean is 3.65 % and its worst 8.9 %, over 8 rows; these are 18."""
    group = GROUPS["Iteration times, Megatron on A100"]
    assert len(group.rows) == 18 and group.mean < 0.035 and group.largest < 0.08


def test_calibration_is_the_best_of_its_grid():
    rows = record.published()["steps_fitted"]

    def error(value: float) -> float:
        return sum(abs(record.predict(e, value).total / record.published_seconds(e) - 1) for e in rows)

    assert min((0.01 * i for i in range(80, 96)), key=error) == pytest.approx(step.EFFICIENCY)


def test_rows_not_fitted():
    """Megatron's table 2, same machine and software, other divisions: the calibration holds there."""
    rows = [r for r in GROUPS["Iteration times that nothing was fitted to"].rows if "PTD-P" in r.name]
    assert len(rows) == 6 and max(abs(r.error) for r in rows) < 0.05


def test_every_row_has_a_source():
    assert all(row.source for group in GROUPS.values() for row in group.rows)


def test_the_article():
    first = GROUPS["The article's estimate of GPT-3"].rows[0]
    assert first.ours == 159_450_660_864 and first.error == pytest.approx(-0.089, abs=0.001)


def test_prints_and_saves(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 0
    assert "Summary" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt"}
