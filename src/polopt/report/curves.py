"""Learning curves, read from run folders: held-out score over what has been used up of a budget."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polopt.engine.run_folder import read_metrics
from polopt.errors import PoloptError

HOLD = 3
"""Evaluations in a row at or above a threshold that make a crossing."""


@dataclass(frozen=True)
class Curve:
    """A run's held-out scores, and what else a comparison asks of it."""

    used: NDArray[np.float64]
    """[n] units before each evaluation, increasing from 0."""
    score: NDArray[np.float64]
    """[n] held-out score of each evaluation."""
    entropy: float
    """Nats per decision in the last iteration that kept a trajectory; NaN if it was not logged."""

    def at(self, used: ArrayLike) -> NDArray[np.float64]:
        """Scores between the evaluations by linear interpolation, after the last one the last one's."""
        return np.interp(np.asarray(used, dtype=np.float64), self.used, self.score)

    def area(self, budget: float) -> float:
        """Mean score from the start until the budget is used up: the area under the curve over the budget."""
        inside = self.used < budget
        used = np.append(self.used[inside], budget)
        score = np.append(self.score[inside], self.at(budget))
        return float(np.trapezoid(score, used) / budget)

    def crossing(self, threshold: float, budget: float, hold: int = HOLD) -> float:
        """What is used up when the score first reaches a threshold and stays there.

        Args:
            threshold: score to reach.
            budget: later evaluations do not count.
            hold: evaluations in a row that must be at or above the threshold; fewer at the end of the curve, but
                never the last one alone if there are others.

        Returns:
            Units before the first of those evaluations; infinity if there are none.
        """
        above = (self.score >= threshold)[self.used <= budget]
        for first in range(len(above)):
            held = above[first : first + hold]
            if held.all() and len(held) >= min(2, len(above)):
                return float(self.used[first])
        return math.inf


def read_curve(run: Path, unit: str) -> Curve:
    """The curve of a finished run.

    Args:
        run: the run's folder. Its metrics must have the unit, all of it that the run made, also those that
            no update saw; its scores are those before and after the run and every `score_every` iterations.
        unit: what the curve runs over.

    Raises:
        PoloptError: the run has no readable summary, or lacks what the curve is made of.
    """
    try:
        summary: dict[str, Any] = json.loads((run / "summary.json").read_bytes())
        before, after = float(summary["before"]["score"]), float(summary["after"]["score"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PoloptError(f"{run / 'summary.json'}: not the summary of a finished run") from error
    lines = read_metrics(run)
    if missing := next((line for line in lines if unit not in line), None):
        raise PoloptError(f"{run}: iteration {missing['iteration']} logs no {unit}")
    used = np.cumsum([0.0, *(line[unit] for line in lines)])
    scored = {0: before} | {i: line["score"] for i, line in enumerate(lines, 1) if "score" in line}
    scored[len(lines)] = after
    where = sorted(scored)
    known = [line["entropy"] for line in lines if "entropy" in line and line.get("rows", 1)]
    entropy = known[-1] if known else math.nan
    return Curve(used[where], np.array([scored[i] for i in where], dtype=np.float64), float(entropy))
