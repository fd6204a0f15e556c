"""A comparison's numbers: the measures of its runs, their statistics for each method, and the table."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from polopt.report.curves import Curve
from polopt.report.statistics import Interval, bootstrap

MEASURES = ("area", "score", "crossing", "entropy", "cpu_seconds")
OVERALL = "all tasks"
POINTS = 21
"""Points of a learning curve in figures and files, from nothing to the whole budget."""


@dataclass(frozen=True)
class Run:
    """The measures of one finished run."""

    task: str
    method: str
    lr: float
    seed: int
    area: float
    """Mean held-out score over the budget."""
    score: float
    """Held-out score when the budget is used up."""
    crossing: float
    """Units of the budget to the threshold; infinity if it is never reached."""
    entropy: float
    """Nats per decision at the end; NaN if unknown."""
    cpu_seconds: float
    """Of training and scoring."""
    curve: Curve = field(repr=False)


def measure(
    curve: Curve,
    budget: float,
    threshold: float,
    *,
    task: str,
    method: str,
    lr: float,
    seed: int,
    cpu_seconds: float,
) -> Run:
    """The measures of a run from its curve."""
    return Run(
        task, method, lr, seed, curve.area(budget), float(curve.at(budget)), curve.crossing(threshold, budget),
        curve.entropy, cpu_seconds, curve,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method's statistics on a task, or on all of them together."""

    task: str
    method: str
    lr: float | None
    """Tuned learning rate; None in the row of all tasks."""
    runs: int
    """Finished runs."""
    asked: int
    """Runs that were asked for."""
    reached: int
    """Runs that reached the threshold."""
    statistics: dict[str, Interval]
    """By measure; a measure that no run has is left out. A run that never reaches the threshold counts with the whole
    budget in `crossing`, which then is a lower bound."""
    difference: Interval | None
    """Area minus that of the first method with the same task and seed; None for the first method itself."""


def summarize(
    runs: Sequence[Run], tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], budget: float
) -> list[Row]:
    """Statistics by task and method, and over all tasks if there are several; the best area first.

    Args:
        runs: finished runs.
        tasks: in the order of the table.
        methods: the first is the baseline.
        seeds: those that were asked for of each method on each task.
        budget: units of a run.
    """
    rows = []
    for places in [[task] for task in tasks] + ([list(tasks)] if len(tasks) > 1 else []):
        found = [_row(runs, places, method, methods[0], len(seeds), budget) for method in methods]
        rows += sorted(found, key=lambda row: -row.statistics["area"].mean if row.runs else math.inf)
    return rows


def _row(
    runs: Sequence[Run], tasks: Sequence[str], method: str, baseline: str, seeds: int, budget: float
) -> Row:
    strata = [[run for run in runs if (run.task, run.method) == (task, method)] for task in tasks]
    mine = [run for stratum in strata for run in stratum]
    statistics = {}
    for name in MEASURES:
        values = [[_value(run, name, budget) for run in stratum] for stratum in strata]
        values = [[value for value in stratum if not math.isnan(value)] for stratum in values]
        if any(values):
            statistics[name] = bootstrap(values)
    single = len(tasks) == 1
    return Row(
        task=tasks[0] if single else OVERALL,
        method=method,
        lr=mine[0].lr if mine and single else None,
        runs=len(mine),
        asked=seeds * len(tasks),
        reached=sum(math.isfinite(run.crossing) for run in mine),
        statistics=statistics,
        difference=None if method == baseline else _difference(runs, strata, baseline),
    )


def _value(run: Run, measure: str, budget: float) -> float:
    return min(run.crossing, budget) if measure == "crossing" else getattr(run, measure)


def _difference(runs: Sequence[Run], strata: list[list[Run]], baseline: str) -> Interval | None:
    """Differences of area between runs that share task and seed, and so initial weights and the prompts' order."""
    areas = {(run.task, run.seed): run.area for run in runs if run.method == baseline}
    pairs = [
        [run.area - areas[run.task, run.seed] for run in stratum if (run.task, run.seed) in areas]
        for stratum in strata
    ]
    return bootstrap(pairs) if any(pairs) else None


def markdown(
    rows: Sequence[Row],
    baseline: str,
    unit: str,
    thresholds: Mapping[str, float],
    grid: Sequence[float],
    failures: dict[str, str],
) -> str:
    """The table as Markdown, one for each task.

    Args:
        rows: of `summarize`.
        baseline: the first method.
        unit: of the budget.
        thresholds: by task, the score that counts as reached.
        grid: learning rates that were tried.
        failures: by name of the run, what was wrong.
    """
    lines = [
        "Interquartile means over seeds with bootstrap 95 % intervals. Methods whose intervals overlap are ties.",
    ]
    for task in dict.fromkeys(row.task for row in rows):
        reached = f"{thresholds[task]:g}" if task in thresholds else "the threshold"
        head = ["method", "lr", "runs", "area", f"area - {baseline}", "score", f"{unit} to {reached}"]
        head += ["reached", "entropy", "CPU s"]
        lines += ["", f"### {task}", "", _line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(row, grid)) for row in rows if row.task == task]
    if len(grid) > 1:
        lines += ["", "lr: tuned on other seeds; * at the edge of the grid: a better one may lie outside."]
    if failures:
        lines += ["", f"Runs that failed ({len(failures)}):", ""]
        lines += [f"- {name}: {' '.join(reason.split())}" for name, reason in sorted(failures.items())]
    return "\n".join(lines) + "\n"


def _cells(row: Row, grid: Sequence[float]) -> list[str]:
    found = row.statistics
    edge = "*" if row.lr in (min(grid), max(grid)) and len(grid) > 1 else ""
    bound = "≥ " if row.reached < row.runs else ""
    return [
        row.method,
        "" if row.lr is None else f"{row.lr:g}{edge}",
        f"{row.runs}/{row.asked}" + (" !" if row.runs < row.asked else ""),
        _interval(found.get("area"), ".3f"),
        _interval(row.difference, "+.3f"),
        _interval(found.get("score"), ".2f"),
        bound + _interval(found.get("crossing"), ".0f"),
        f"{row.reached}/{row.runs}",
        _interval(found.get("entropy"), ".2f"),
        _interval(found.get("cpu_seconds"), ".2g"),
    ]


def _interval(found: Interval | None, form: str) -> str:
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]" if found else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def results_json(rows: Sequence[Row], runs: Sequence[Run], **further: Any) -> str:
    """Everything as strict JSON, to six digits; what is not finite is null."""
    plain = [{name: value for name, value in vars(run).items() if name != "curve"} for run in runs]
    found = {**further, "summary": [asdict(row) for row in rows], "runs": plain}
    return json.dumps(_plain(found), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def results_csv(runs: Sequence[Run]) -> str:
    """One line for each run; a threshold that was never reached is left empty."""
    names = [name for name in Run.__dataclass_fields__ if name != "curve"]
    return _csv(names, [[_plain(getattr(run, name)) for name in names] for run in runs])


def curves_csv(bands: dict[tuple[str, str], np.ndarray], budget: float) -> str:
    """The curves of the figures: interquartile mean and interval by task, method and share of the budget."""
    used = np.linspace(0, budget, POINTS)
    lines = [
        [task, method, f"{at:g}", *(f"{value:.4f}" for value in point)]
        for (task, method), band in bands.items()
        for at, point in zip(used, band.T, strict=True)
    ]
    return _csv(["task", "method", "used", "score", "low", "high"], lines)


def _csv(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return text.getvalue()
