"""`polopt eval`: the held-out score of a checkpoint."""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from polopt.cli.building import assemble, prepare
from polopt.cli.flags import Parser, merge
from polopt.cli.train import read_run
from polopt.config import RunConfig, configure
from polopt.engine.progress import printable, score_table
from polopt.errors import ConfigError

FIELDS = {
    "--prompts": ("trainer", "score_prompts"),
    "--rollouts": ("trainer", "score_rollouts"),
    "--temperature": ("language", "score_temperature"),
}
"""What a flag sets of the run's own configuration."""


def evaluate(argv: Sequence[str]) -> int:
    """Score a run's checkpoint on the held-out split: mean reward, pass@k and majority vote with intervals."""
    parser = Parser("eval", "Score a run on its held-out split. Writes nothing.", "one run folder")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument(
        "--checkpoint", type=int, metavar="K", help="that of iteration K; by default the newest intact"
    )
    for flag, text in (
        ("--prompts", "held-out prompts"),
        ("--rollouts", "rollouts of each, for pass@k and majority vote; needs a temperature above 0"),
        ("--temperature", "of sampling; 0 is greedy"),
    ):
        parser.add_argument(flag, metavar="N", help=f"{text}; by default as in the run")
    parsed = parser.parse(argv)
    run = parsed["run"]
    description = read_run(run)
    values: dict[str, Any] = {"trackers": []}
    for flag, (section, field) in FIELDS.items():
        if (value := parsed[flag.removeprefix("--")]) is not None:
            values.setdefault(section, {})[field] = value
    names = {path: flag for flag, path in FIELDS.items()}
    config = configure(merge(description, values), names, str(run / "config.json"))
    _score(run, description, config, parsed["checkpoint"])
    return 0


def _score(run: Path, description: dict[str, Any], config: RunConfig, iteration: int | None) -> None:
    prepared = prepare(config)
    console = Console()
    with closing(prepared.task):
        state = _load(run, description, iteration, console)
        trainer = assemble(prepared)
        trainer.load_state_dict(state)
        scores = trainer.score()
        trainer.ranks.close()
    t = prepared.config.trainer
    prompts = min(t.score_prompts, prepared.task.heldout_size)
    title = f"{run}, iteration {trainer.iteration}: {prompts} held-out prompts x {t.score_rollouts}"
    console.print(printable(title), markup=False, highlight=False, soft_wrap=True)
    console.print(score_table({"held out": scores}))


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
