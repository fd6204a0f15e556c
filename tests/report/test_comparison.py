"""A comparison's numbers: ranks, paired differences, censored crossings, failures."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from polopt.errors import MissingExtraError
from polopt.report import figure
from polopt.report.comparison import (
    POINTS,
    Run,
    curves_csv,
    markdown,
    measure,
    results_csv,
    results_json,
    summarize,
)
from polopt.report.curves import Curve
from polopt.report.statistics import bootstrap_band

BUDGET, TASKS, METHODS, SEEDS = 100, ["easy", "hard"], ["base", "new"], [0, 1, 2]


def run(task: str, method: str, seed: int, end: float, entropy: float = 0.3) -> Run:
    """A straight line from 0 to `end`."""
    curve = Curve(np.array([0.0, 50.0, 100.0]), np.array([0, end / 2, end]), entropy)
    return measure(curve, BUDGET, 0.4, task=task, method=method, lr=0.1, seed=seed, cpu_seconds=2.0)


def all_runs() -> list[Run]:
    ends = {("easy", "base"): 0.6, ("easy", "new"): 1.0, ("hard", "base"): 0.2, ("hard", "new"): 0.1}
    return [run(*key, seed, end + 0.01 * seed) for key, end in ends.items() for seed in SEEDS]


def test_rows_are_ranked_by_area_for_each_task_and_for_all() -> None:
    rows = summarize(all_runs(), TASKS, METHODS, SEEDS, BUDGET)
    assert [(row.task, row.method) for row in rows] == [
        ("easy", "new"), ("easy", "base"), ("hard", "base"), ("hard", "new"), ("all tasks", "new"), ("all tasks", "base")
    ]  # fmt: skip
    assert all(row.runs == row.asked == 3 * (2 if row.task == "all tasks" else 1) for row in rows)
    assert rows[0].statistics["area"].mean == pytest.approx(0.505)
    assert rows[0].lr == 0.1 and rows[-1].lr is None


def test_differences_are_paired_by_seed() -> None:
    rows = summarize(all_runs(), TASKS, METHODS, SEEDS, BUDGET)
    found = rows[0].difference
    assert found is not None and (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert rows[1].difference is None  # the baseline's own


def test_runs_that_never_reach_the_threshold_count_with_the_whole_budget() -> None:
    runs = [run("easy", "base", 0, 0.9), run("easy", "base", 1, 0.2), run("easy", "base", 2, 0.1)]
    (row,) = summarize(runs, ["easy"], ["base"], SEEDS, BUDGET)
    assert row.reached == 1 and row.statistics["crossing"].high == BUDGET
    assert "≥" in markdown([row], "base", "rollouts", {"easy": 0.4}, [0.1], {}) and "1/3" in markdown(
        [row], "base", "rollouts", {"easy": 0.4}, [0.1], {}
    )


def test_missing_runs_are_said_and_a_method_without_any_keeps_its_row() -> None:
    runs = [r for r in all_runs() if r.method == "base" and (r.task, r.seed) != ("easy", 2)]
    rows = summarize(runs, TASKS, METHODS, SEEDS, BUDGET)
    text = markdown(rows, "base", "rollouts", {"easy": 0.4}, [0.1], {"easy/new/seed-0": "it\nbroke"})
    assert "| base | 0.1 | 2/3 ! |" in text and "| new |  | 0/3 ! | - |" in text
    assert "- easy/new/seed-0: it broke" in text


def test_rates_at_the_edge_of_the_grid_are_marked() -> None:
    rows = summarize(all_runs(), ["easy"], METHODS, SEEDS, BUDGET)
    assert "| 0.1* |" in markdown(rows, "base", "rollouts", {"easy": 0.4}, [0.01, 0.1], {})
    assert "| 0.1 |" in markdown(rows, "base", "rollouts", {"easy": 0.4}, [0.01, 0.1, 1.0], {})


def test_unknown_entropy_is_left_out() -> None:
    (row,) = summarize([run("easy", "base", 0, 0.5, math.nan)], ["easy"], ["base"], [0], BUDGET)
    assert "entropy" not in row.statistics
    assert "| - |" in markdown([row], "base", "rollouts", {"easy": 0.4}, [0.1], {})


def test_files_are_strict_and_complete() -> None:
    runs = all_runs()
    rows = summarize(runs, TASKS, METHODS, SEEDS, BUDGET)
    found = json.loads(results_json(rows, runs, budget=BUDGET), parse_constant=pytest.fail)
    assert len(found["runs"]) == 12 and len(found["summary"]) == 6 and found["budget"] == BUDGET
    lines = list(csv.DictReader(io.StringIO(results_csv(runs))))
    assert len(lines) == 12 and {line["crossing"] for line in lines if line["task"] == "hard"} == {""}
    bands = {("easy", "base"): bootstrap_band([r.curve.at(np.linspace(0, 100, POINTS)) for r in runs[:3]])}
    points = list(csv.DictReader(io.StringIO(curves_csv(bands, BUDGET))))
    assert len(points) == POINTS and float(points[-1]["used"]) == BUDGET and float(points[0]["score"]) == 0


def test_figure_has_a_panel_for_each_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bands = {name: np.linspace([0, 0, 0], [0.5, 0.4, 0.6], 41).T for name in ("base", "new")}
    bands["flat"] = np.zeros((3, 41))
    figure.draw_curves(
        {"flat": bands["flat"]}, ["flat"], "flat", 100, "rollouts", "hard", tmp_path / "flat.png"
    )
    for methods in (["base"], ["new", "base", "failed"]):
        figure.draw_curves(bands, methods, "base", 100, "rollouts", "easy", tmp_path / f"{len(methods)}.png")
        assert (tmp_path / f"{len(methods)}.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"polopt\[report\]"):
        figure.require_matplotlib()
