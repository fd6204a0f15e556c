"""Learning curves: areas and crossings of known curves, and what is read from a run folder."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polopt.engine.run_folder import RunFolder
from polopt.errors import PoloptError
from polopt.report.curves import Curve, read_curve


def curve(used: list[float], score: list[float]) -> Curve:
    return Curve(np.array(used, dtype=float), np.array(score, dtype=float), 0.5)


@pytest.mark.parametrize(
    ("used", "score", "budget", "area"),
    [
        ([0, 10], [0.3, 0.3], 10, 0.3),
        ([0, 10], [0.0, 1.0], 10, 0.5),
        ([0, 10], [0.0, 1.0], 20, 0.75),  # after the last evaluation its score holds
        ([0, 10], [0.0, 1.0], 5, 0.25),  # nothing after the budget counts
        ([0, 5, 10, 15], [0.0, 1.0, 1.0, 0.0], 10, 0.75),
        ([0], [0.4], 8, 0.4),
    ],
)
def test_area_of_known_curves(used: list[float], score: list[float], budget: float, area: float) -> None:
    assert curve(used, score).area(budget) == pytest.approx(area, abs=1e-12)


def test_area_does_not_depend_on_further_evaluations_on_the_line() -> None:
    few, many = curve([0, 8, 16], [0, 0.8, 0.4]), curve([0, 4, 8, 12, 16], [0, 0.4, 0.8, 0.6, 0.4])
    assert few.area(14) == pytest.approx(many.area(14), abs=1e-12)


@pytest.mark.parametrize(
    ("score", "crossing"),
    [
        ([0, 0.9, 0.9, 0.9, 0.2], 1),
        ([0, 0.9, 0.1, 0.9, 0.9, 0.9], 3),  # one lucky evaluation is no crossing
        ([0.9, 0.9, 0.9], 0),
        ([0, 0, 0, 0.9, 0.9], 3),
        ([0, 0, 0, 0.9], math.inf),
        ([0, 0, 0], math.inf),
        ([0, 0.8, 0.8, 0.8], 1),
    ],
)
def test_crossing_holds_for_three_evaluations(score: list[float], crossing: float) -> None:
    assert curve(list(range(len(score))), score).crossing(0.8, budget=100) == crossing


def test_crossing_after_the_budget_does_not_count() -> None:
    assert curve([0, 1, 2, 3, 4], [0, 0, 0, 1, 1]).crossing(0.5, budget=2) == math.inf


def folder(path: Path, lines: list[dict[str, Any]], summary: dict[str, Any] | None) -> Path:
    with RunFolder.open(path) as run:
        for iteration, line in enumerate(lines, 1):
            run.log_metrics(iteration, line)
        if summary is not None:
            run.write_summary(summary)
    return path


SUMMARY = {"before": {"score": 0.1}, "after": {"score": 0.7}}


def test_all_rollouts_count_and_scores_stand_where_they_were_made(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"rollouts": 4, "tokens": 40, "entropy": 2.0},
        {"rollouts": 8, "tokens": 10, "score": 0.5},
        {"rollouts": 4, "tokens": 50, "entropy": 1.0},
        {"rollouts": 4, "tokens": 60, "entropy": 0.0, "rows": 0.0},  # a sampler turned all of them down
    ]
    run = folder(tmp_path / "run", lines, SUMMARY)
    found = read_curve(run, "rollouts")
    assert found.used.tolist() == [0, 12, 20] and found.score.tolist() == [0.1, 0.5, 0.7]
    assert found.entropy == 1.0
    assert read_curve(run, "tokens").used.tolist() == [0, 50, 160]


def test_run_without_summary_or_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PoloptError, match="summary of a finished run"):
        read_curve(folder(tmp_path / "a", [{"rollouts": 1}], None), "rollouts")
    with pytest.raises(PoloptError, match="iteration 2 logs no rollouts"):
        read_curve(folder(tmp_path / "b", [{"rollouts": 1}, {"tokens": 3}], SUMMARY), "rollouts")
    (tmp_path / "b" / "summary.json").write_text(json.dumps({"before": 3}))
    with pytest.raises(PoloptError, match="summary"):
        read_curve(tmp_path / "b", "tokens")
