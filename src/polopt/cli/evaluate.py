"""`polopt eval`: the held-out score of a checkpoint."""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from polopt.cli.building import assemble, prepare
from polopt.cli.domains import DOMAINS
from polopt.cli.flags import Parser, merge
from polopt.cli.train import read_run
from polopt.config import RunConfig, configure
from polopt.engine.progress import printable, score_table
from polopt.errors import ConfigError

FIELDS = {
    "--prompts": ("trainer", "score_prompts", "held-out prompts or start states"),
    "--rollouts": (
        "trainer", "score_rollouts", "rollouts of each, for pass@k and majority vote; needs a temperature above 0"
    ),
    "--temperature": ("language", "score_temperature", "of sampling; 0 is greedy"),
    "--policy": ("control", "score_policy", '"deterministic", "stochastic" or "both": mode of the actions, or draws'),
}  # fmt: skip
"""What a flag sets of the run's own configuration, and what for."""
BOTH, POLICIES = "both", ("deterministic", "stochastic")


def evaluate(argv: Sequence[str]) -> int:
    """Score a run's checkpoint on the held-out split: mean reward, pass@k and majority vote with intervals."""
    parser = Parser("eval", "Score a run on its held-out split.", "one run folder")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument(
        "--checkpoint", type=int, metavar="K", help="that of iteration K; by default the newest intact"
    )
    for flag, (_, _, text) in FIELDS.items():
        parser.add_argument(flag, metavar="N", help=f"{text}; by default as in the run")
    parser.add_argument(
        "--render",
        type=Path,
        metavar="FILE",
        help="film the first held-out episode into FILE.gif or FILE.mp4",
    )
    parsed = parser.parse(argv)
    run = parsed["run"]
    description = read_run(run)
    values: dict[str, Any] = {"trackers": []}
    for flag, (section, field, _) in FIELDS.items():
        if (value := parsed[flag.removeprefix("--")]) is not None:
            _check_domain(flag, section, description)
            values.setdefault(section, {})[field] = value
    if parsed["render"] is not None:
        _check_domain("--render", "control", description)
    names = {(section, field): flag for flag, (section, field, _) in FIELDS.items()}
    columns = {"held out": values}
    if parsed["policy"] == BOTH:
        columns = {kind: merge(values, {"control": {"score_policy": kind}}) for kind in POLICIES}
    configs = {
        title: configure(merge(description, given), names, str(run / "config.json"))
        for title, given in columns.items()
    }
    title, scores, film, console = "", {}, parsed["render"], Console()
    for column, config in configs.items():
        title, scores[column] = _score(run, description, config, parsed["checkpoint"], film, console)
        film = None  # by the first of both
    console.print(printable(title), markup=False, highlight=False, soft_wrap=True)
    console.print(score_table(scores))
    return 0


def _check_domain(flag: str, section: str, description: dict[str, Any]) -> None:
    if section in DOMAINS and section != description["domain"]:
        raise ConfigError(
            f"{flag}: is for runs of the domain {section!r}; this one is of {description['domain']!r}"
        )


def _score(
    run: Path,
    description: dict[str, Any],
    config: RunConfig,
    iteration: int | None,
    film: Path | None,
    console: Console,
) -> tuple[str, dict[str, Any]]:
    """A title and the scores; writes the film if there is to be one."""
    prepared = prepare(config)
    with closing(prepared.task):
        if film is not None:
            from polopt.control.film import check_film

            check_film(film, prepared.task)
        state = _load(run, description, iteration, console)
        trainer = assemble(prepared)
        trainer.load_state_dict(state)
        scores = trainer.score()
        trainer.ranks.close()
        if film is not None:
            _film(trainer, film, console)
    t = prepared.config.trainer
    prompts = min(t.score_prompts, prepared.task.heldout_size)
    return f"{run}, iteration {trainer.iteration}: {prompts} held-out prompts x {t.score_rollouts}", scores


def _film(trainer: Any, file: Path, console: Console) -> None:
    from polopt.control.film import film
    from polopt.engine.seeding import generator

    draws = generator(trainer.config.seed, "score", trainer.iteration)
    made = film(trainer.actor, trainer.task, draws, file)
    text = f"{file}: {made.samples[0]['completion']}"
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _load(run: Path, description: dict[str, Any], iteration: int | None, console: Console) -> dict[str, Any]:
    from polopt.engine import checkpoint
    from polopt.engine.ranks import Ranks
    from polopt.engine.record import Record

    fingerprint = Record(None, description, 1, (), Ranks()).fingerprint
    folder = run / "checkpoints"
    if iteration is not None:
        path = folder / f"iteration-{iteration:06d}"
        if not os.path.isdir(path):
            there = ", ".join(
                str(int(p.name.removeprefix("iteration-").partition(".")[0]))
                for p in checkpoint.checkpoints(folder)
            )
            raise ConfigError(
                f"--checkpoint {iteration}: there is none of that iteration; there are: {there or 'none'}"
            )
        return checkpoint.load(path, fingerprint)
    state, path, damaged = checkpoint.load_newest(folder, fingerprint)
    for bad, reason in damaged:
        console.print(
            printable(f"checkpoint {bad.name} is damaged ({reason}); scoring {path.name}"), markup=False
        )
    return state
