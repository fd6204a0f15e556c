"""`polopt compare`: methods under equal budgets, with tuned learning rates, several seeds and intervals."""

import math
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from polopt.cli.building import check_quickly, resolve
from polopt.cli.catalog import library
from polopt.cli.comparison import CompareConfig, Comparison, slug
from polopt.cli.domains import DOMAINS
from polopt.cli.flags import Flag, Parser, collect, merge, run_flags
from polopt.cli.jobs import cpu_seconds, is_finished, run_all
from polopt.config import RunConfig, configure, read_toml
from polopt.engine.progress import printable
from polopt.errors import ConfigError, PoloptError

OWN_FIELDS = {("method",), ("out",), ("trainer", "seed"), ("budget",)}
"""Fields of a run without a flag here: what a comparison sets itself, and the slot whose flag means another budget."""
ALL = "all"
INTERRUPTED = 130
_REPORT_EVERY = 10.0
"""Seconds between lines of progress."""


def compare(argv: Sequence[str]) -> int:
    """Compare methods; goes on where it was interrupted."""
    flags = [flag for group in run_flags().values() for flag in group if flag.path not in OWN_FIELDS]
    own = [
        Flag("--" + name.replace("_", "-"), ("compare", name), field)
        for name, field in CompareConfig.model_fields.items()
    ]
    parser = Parser(
        "compare",
        "Compare methods under equal budgets: tune the learning rate, run seeds, write table and figure. Called again\n"
        "with the same --out, it makes the runs that are missing. Also takes the flags of a run.",
        "one TOML file",
        usage="polopt compare [compare.toml] [flags]",
    )
    parser.add_argument(
        "file", nargs="?", metavar="compare.toml", help="configuration file with a table [compare]"
    )
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder (default comparison)")
    parser.add_argument("--jobs", metavar="INT", help="runs at the same time (default: the cores)")
    parser.add_argument(
        "--dry-run", action="store_true", help="show configuration and number of runs; run nothing"
    )
    parser.add_flags("the comparison: [compare]", own)
    parser.add_flags("all runs", flags)
    parsed = parser.parse(argv)
    jobs = _count(parsed["jobs"])
    comparison = _prepare(parsed, [*flags, *own])
    if parsed["dry_run"]:
        sys.stdout.write(f"{comparison.to_toml()}\n# {comparison.size()}\n")
        return 0
    console = Console()
    try:
        return _run(comparison, jobs, console)
    except KeyboardInterrupt:
        _say(console, "Interrupted; the same command goes on")
        return INTERRUPTED


def _prepare(parsed: dict[str, Any], flags: Sequence[Flag]) -> Comparison:
    values, given = collect(parsed, flags)
    file = parsed["file"]
    values = merge(read_toml(Path(file)), values) if file is not None else values
    own = values.pop("compare", {})
    if not isinstance(own, dict):
        raise ConfigError(f"{file}: compare = {own!r}: write a table [compare]")
    config = _own_config(own, given)
    base = configure(values, given, file or "")
    trainer, units = base.trainer, DOMAINS[base.domain].units
    unit = config.budget_unit or units[0]
    if unit not in units:
        raise ConfigError(f"--budget-unit = {unit!r}: the domain {base.domain!r} counts {' or '.join(units)}")
    if not (config.budget or trainer.iterations):
        raise ConfigError("trainer.iterations = 0: leaves nothing to compare")
    if "rollouts" in units:  # then an iteration has as many of them for all methods
        sizes = {name: getattr(trainer, name) for name in ("prompts", "rollouts")}
        values["trainer"] = {**values.get("trainer", {}), **sizes}
    resolved = _resolve(config, base, values)
    sizes = {m: DOMAINS[base.domain].iteration_size(*found, unit) for (_, m), found in resolved.items()}
    configs = {pair: found for pair, (found, _) in resolved.items()}
    comparison = Comparison(config, base, configs, sizes, unit, parsed["out"])
    _check_sizes(comparison)
    return comparison


def _check_sizes(comparison: Comparison) -> None:
    """Refuse what cannot be planned where nobody knows beforehand how many units an iteration has."""
    unknown, unit = [m for m, size in comparison.sizes.items() if size is None], comparison.unit
    if unknown and not comparison.base.trainer.score_every:
        raise ConfigError(
            f"trainer.score_every = 0: say how often to score, an iteration of {unknown[0]!r} has no fixed number of {unit}"
        )
    if not comparison.budget:
        raise ConfigError(
            f"budget = 0: a budget in {unit} must be given, where {unknown[0]!r} is the first method"
        )


def _own_config(own: dict[str, Any], given: dict[tuple[str, ...], str]) -> CompareConfig:
    try:
        return CompareConfig.create("compare", **own)
    except ConfigError as error:
        message = str(error).removeprefix("compare: ")
        for (section, *name), flag in given.items():
            if section == "compare" and message.startswith(f"compare.{name[0]}"):
                message = flag + message.removeprefix(f"compare.{name[0]}")
        raise ConfigError(message) from None


def _resolve(
    config: CompareConfig, base: RunConfig, values: dict[str, Any]
) -> dict[tuple[str, str], tuple[RunConfig, Any]]:
    """The runs' configurations and methods by task and method, all of which can work.

    Raises:
        ConfigError: a method or a task is unknown, or they do not fit together.
    """
    named = [method for method in config.methods if method != ALL]
    found = {}
    tasks = config.tasks or [base.task]
    plain = {(t, m): configure({**values, "task": t, "method": m}) for t in tasks for m in named}
    for run in plain.values():
        check_quickly(run)
    for key, run in plain.items():
        found[key] = resolve(run)
    for method in sorted(library().recipes - set(named)) if ALL in config.methods else ():
        try:
            runs = {t: resolve(configure({**values, "task": t, "method": method})) for t in tasks}
        except ConfigError:
            continue  # of another domain
        found |= {(task, method): run for task, run in runs.items()}
    for task in tasks:
        DOMAINS[base.domain].task(found[task, next(iter(found))[1]][0]).close()
    return found


def _run(comparison: Comparison, jobs: int, console: Console) -> int:
    from polopt.report.figure import require_matplotlib

    require_matplotlib()
    _claim(comparison)
    _say(console, f"{comparison.size()}, {jobs} at a time, into {comparison.out}")
    pairs = list(comparison.resolved)
    seeds, lrs = comparison.tuning_seeds, comparison.lrs
    tuning = [(*pair, lr, seed) for pair in pairs for lr in lrs for seed in seeds]
    failures = _make(comparison, tuning, jobs, console, "tuning")
    areas = {pair: _tuned(comparison, pair) for pair in pairs}
    best = {pair: max(found, key=found.__getitem__, default=lrs[0]) for pair, found in areas.items()}
    reported = [(*pair, best[pair], seed) for pair in pairs for seed in range(comparison.config.seeds)]
    failures |= _make(comparison, reported, jobs, console, "reported")
    _write(comparison, reported, areas, failures, console)
    return 0


RunKey = tuple[str, str, float, int]
"""Task, method, learning rate and seed."""


def _make(
    comparison: Comparison, keys: Sequence[RunKey], processes: int, console: Console, what: str
) -> dict[str, str]:
    """Make the runs that are not finished; what was wrong with those that failed, by name."""
    jobs = [comparison.job(*key) for key in keys if not is_finished(comparison.folder(*key))]
    failures: dict[str, str] = {}
    started = said = time.monotonic()
    with closing(run_all(jobs, processes)) as outcomes:
        for done, (job, outcome) in enumerate(outcomes, 1):
            name = str(Path(job["config"]["out"]).relative_to(comparison.out / "runs"))
            if outcome["status"] == "failed":
                failures[name] = outcome["error"]
                _say(console, f"{name} failed: {outcome['error']}")
            elif outcome["status"] == "interrupted":
                raise KeyboardInterrupt
            now = time.monotonic()
            if now - said > _REPORT_EVERY or done == len(jobs):
                said = now
                left = (now - started) / done * (len(jobs) - done) / 60
                _say(console, f"{what}: {done} of {len(jobs)} runs, about {left:.0f} min left")
    return failures


def _tuned(comparison: Comparison, pair: tuple[str, str]) -> dict[float, float]:
    """Mean area over the tuning seeds by learning rate; one with a run that failed comes last."""
    from polopt.report.curves import read_curve

    seeds, areas = comparison.tuning_seeds, {}
    for lr in comparison.lrs if seeds else ():
        folders = [comparison.folder(*pair, lr, seed) for seed in seeds]
        curves = [read_curve(f, comparison.unit) for f in folders if is_finished(f)]
        total = sum(curve.area(comparison.budget) for curve in curves)
        areas[lr] = total / len(seeds) if len(curves) == len(seeds) else -math.inf
    return areas


def _write(
    comparison: Comparison,
    reported: Sequence[RunKey],
    areas: dict[tuple[str, str], dict[float, float]],
    failures: dict[str, str],
    console: Console,
) -> None:
    import numpy as np

    from polopt.report import comparison as report
    from polopt.report.curves import read_curve
    from polopt.report.figure import draw_curves
    from polopt.report.statistics import bootstrap_band

    c, budget, methods, tasks = comparison.config, comparison.budget, comparison.methods, comparison.tasks
    unit, thresholds = comparison.unit, comparison.thresholds
    runs = []
    for task, method, lr, seed in reported:
        folder = comparison.folder(task, method, lr, seed)
        if is_finished(folder):
            curve, seconds = read_curve(folder, unit), cpu_seconds(folder)
            named: dict[str, Any] = {"task": task, "method": method, "lr": lr, "seed": seed}
            runs.append(report.measure(curve, budget, thresholds[task], cpu_seconds=seconds, **named))
    if not runs:
        raise PoloptError(f"{comparison.out}: every run failed, {next(iter(failures.values()), '')}")
    rows = report.summarize(runs, tasks, methods, range(c.seeds), budget)
    grid = np.linspace(0, budget, report.POINTS)
    curves = {
        (t, m): [r.curve.at(grid) for r in runs if (r.task, r.method) == (t, m)]
        for t, m in comparison.resolved
    }
    bands = {key: bootstrap_band(found) for key, found in curves.items() if found}
    table = report.markdown(rows, methods[0], unit, thresholds, comparison.lrs, failures)
    tuned = [{"task": t, "method": m, "area": found} for (t, m), found in areas.items() if found]
    further = {"budget": budget, "unit": unit, "thresholds": thresholds, "baseline": methods[0]}
    texts = {
        "table.md": table,
        "results.csv": report.results_csv(runs),
        "results.json": report.results_json(rows, runs, **further, tuning=tuned, failures=failures),
        "curves.csv": report.curves_csv(bands, budget),
    }
    for name, text in texts.items():
        (comparison.out / name).write_text(text)
    for task in tasks:
        order = [row.method for row in rows if row.task == task]
        mine = {method: band for (of, method), band in bands.items() if of == task}
        name = "curves.png" if len(tasks) == 1 else f"curves-{slug(task)}.png"
        draw_curves(mine, order, methods[0], budget, unit, task, comparison.out / name)
    _say(console, table)
    _say(console, f"Written: {comparison.out} (table.md, results.json, results.csv, curves.csv, figures)")


def _claim(comparison: Comparison) -> None:
    """Make the folder, or see that it holds this comparison; methods and seeds may have been added.

    Raises:
        ConfigError: it holds another comparison, or cannot be made.
    """
    file, text = comparison.out / "compare.toml", comparison.to_toml()
    if file.exists():
        changed = [line for line in set(text.splitlines()) ^ set(file.read_text().splitlines()) if line]
        changed = [line for line in changed if not re.match(r"(methods|seeds|threshold) = ", line)]
        if changed:
            field = min(changed).partition(" = ")[0]
            raise ConfigError(
                f"out = '{comparison.out}': holds a comparison with another {field}; choose another --out"
            )
    try:
        comparison.out.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"out = '{comparison.out}': cannot be made, {error.strerror}") from None


def _count(text: str | None) -> int:
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--jobs = {text!r}: must be a number above 0")
    return int(text)


def _say(console: Console, text: str) -> None:
    for line in text.splitlines():
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
