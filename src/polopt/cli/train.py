"""`polopt train` and `polopt resume`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polopt.cli.building import (
    Prepared,
    assemble,
    check_folder,
    claim_folder,
    close,
    is_main_process,
    prepare,
    release_folder,
)
from polopt.cli.domains import DOMAINS
from polopt.cli.flags import Flag, Parser, collect, merge, run_flags
from polopt.config import RunConfig, configure, read_toml, to_toml
from polopt.engine.progress import ProgressReporter
from polopt.engine.tracking import Expendable, TrackerReporter
from polopt.errors import ConfigError, PoloptError

TITLES = {
    "run": "the run",
    "trainer": "sizes and lengths: [trainer]",
    "language": "language models: [language]",
    "control": "environments: [control]",
    "miniature": "small networks from scratch: [miniature]",
}
MAY_CHANGE = (*(("trainer", name) for name in ("iterations", "keep", "ranks", "sharding")), ("trackers",))
"""Fields that a resumed run may have otherwise than it began with."""
INTERRUPTED = 130


def train(argv: Sequence[str]) -> int:
    """Train by a configuration file and flags; without either, the main job."""
    flags = run_flags()
    parser = Parser(
        "train",
        "Train a policy. Every flag is a field of the configuration; a flag overrides the file.",
        "one TOML file",
        usage="polopt train [run.toml] [flags]",
    )
    parser.add_argument("file", nargs="?", metavar="run.toml", help="configuration file")
    parser.add_argument(
        "--dry-run", action="store_true", help="show configuration, memory and time; load nothing"
    )
    _add_quiet(parser)
    for section, group in flags.items():
        parser.add_flags(TITLES[section], group)
    parsed = parser.parse(argv)
    values, given = collect(parsed, [flag for group in flags.values() for flag in group])
    file = parsed["file"]
    config = configure(
        merge(read_toml(Path(file)), values) if file is not None else values, given, file or ""
    )
    check_folder(config.out)
    prepared = prepare(config)
    if parsed["dry_run"]:
        return _show(prepared)
    return _train(prepared, parsed["quiet"])


def resume(argv: Sequence[str]) -> int:
    """Continue a run from its newest intact checkpoint."""
    flags = [flag for group in run_flags().values() for flag in group]
    changing = [flag for flag in flags if flag.path in MAY_CHANGE]
    parser = Parser("resume", "Continue a run from its newest intact checkpoint.", "one run folder")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    _add_quiet(parser)
    parser.add_flags("what may change", changing)
    _refuse_fixed(argv, [flag for flag in flags if flag not in changing], changing)
    parsed = parser.parse(argv)
    run = parsed["run"]
    values, given = collect(parsed, changing)
    config = configure(merge(read_run(run), values), given, str(run / "config.json"))
    _refuse_finished(run, config)
    prepared = prepare(config)
    return _run(prepared, run, resume=True, quiet=parsed["quiet"])


def read_run(run: Path) -> dict[str, Any]:
    """The configuration that a run was started with.

    Raises:
        ConfigError: there is no run in the folder.
    """
    if not os.path.isfile(run / "config.json"):
        raise ConfigError(f"{run}: holds no run (no config.json); name the folder that `polopt train` wrote")
    from polopt.engine.run_folder import RunFolder

    return RunFolder(run).read_config()


def _add_quiet(parser: Parser) -> None:
    parser.add_argument(
        "--quiet", action="store_true", help="show no progress, only messages and the summary"
    )


def _train(prepared: Prepared, quiet: bool) -> int:
    if not is_main_process():
        return _run(prepared, prepared.config.out or Path("runs"), resume=False, quiet=True)
    out = claim_folder(prepared.config)
    config = prepared.config.model_copy(update={"out": out})
    try:
        return _run(prepared._replace(config=config), out, resume=False, quiet=quiet)
    finally:
        release_folder(out)


def _run(prepared: Prepared, out: Path, resume: bool, quiet: bool) -> int:
    with ProgressReporter(quiet=quiet) as progress:
        trackers = [
            Expendable(TrackerReporter(name, out), f"tracker {name}", progress.message)
            for name in prepared.config.trackers
        ]
        if is_main_process():
            progress.message(_announcement(prepared, out))
        try:
            trainer = assemble(prepared, [progress, *trackers], out)
            try:
                summary = trainer.run(resume)
            finally:
                close(trainer)
        except KeyboardInterrupt:
            return _stopped_at_once(progress, out)
        if summary["interrupted"]:
            if is_main_process():
                progress.message(
                    f"Interrupted after {summary['iteration']} iterations; go on: polopt resume {out}"
                )
            return INTERRUPTED
        return 0


def _announcement(prepared: Prepared, out: Path) -> str:
    c, t = prepared.config, prepared.config.trainer
    sizes = f"{t.iterations} iterations of {t.prompts} x {t.rollouts} rollouts"
    return f"{prepared.method.name} on {c.task}: {sizes}, into {out}"


def _stopped_at_once(progress: ProgressReporter, out: Path) -> int:
    if any((out / "checkpoints").glob("iteration-*")):
        progress.message(f"Stopped at once; go on from the last checkpoint: polopt resume {out}")
    else:
        progress.message("Stopped before the first checkpoint: there is nothing to resume")
    return INTERRUPTED


def _show(prepared: Prepared) -> int:
    """The resolved configuration as a TOML file, with method and estimate as comments."""
    config, method, task = prepared
    try:
        estimate = DOMAINS[config.domain].estimate(config, task, method)
    finally:
        task.close()
    comments = [f"{part.slot}: {part.name} {_options(part)}".rstrip() for part in method.parts]
    lines = [to_toml(config), *(f"# {line}" for line in [*comments, *estimate.lines()])]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _options(part: Any) -> str:
    options = part.config.model_dump(mode="json", exclude_none=True)
    return f"({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""


def _refuse_fixed(argv: Sequence[str], fixed: Sequence[Flag], changing: Sequence[Flag]) -> None:
    names = {flag.name for flag in fixed}
    for argument in argv:
        if argument.partition("=")[0] in names:
            allowed = ", ".join(flag.name for flag in changing)
            raise ConfigError(
                f"{argument.partition('=')[0]}: cannot change when a run is resumed; may change: {allowed}"
            )


def _refuse_finished(run: Path, config: RunConfig) -> None:
    summary = run / "summary.json"
    if not summary.is_file():
        return
    try:
        found = json.loads(summary.read_bytes())
        done = not found["interrupted"] and found["iteration"] >= config.trainer.iterations
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PoloptError(f"{summary}: not a run's summary; remove it to go on") from error
    if done:
        raise ConfigError(f"{run}: all {found['iteration']} iterations are done; go on with --iterations N")
