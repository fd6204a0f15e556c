"""What `polopt compare` compares: its configuration, and the runs that it asks for."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from polopt.cli.domains import DOMAINS
from polopt.cli.jobs import Job
from polopt.config import RunConfig, to_toml
from polopt.settings import Settings

TUNING_SEED = 1_000_000
"""First seed of the runs that the learning rate is tuned on; none of the reported ones."""
LR_FACTORS = (0.3, 1.0, 3.0)


def slug(text: str) -> str:
    """The text as a file name."""
    return re.sub(r"[^\w.-]+", "-", text)


def _split(value: Any) -> Any:
    """The items of texts that commas separate."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        return value
    texts = [item.split(",") if isinstance(item, str) else [item] for item in items]
    return [item.strip() if isinstance(item, str) else item for text in texts for item in text]


class CompareConfig(Settings):
    """What is compared: the table [compare] of a configuration file."""

    methods: Annotated[list[str], BeforeValidator(_split)] = Field(default=["grpo"], min_length=1)
    """Recipes, separated by commas, the baseline first; "all" stands for all others that work there."""
    tasks: Annotated[list[str], BeforeValidator(_split)] = Field(default_factory=list)
    """Tasks, separated by commas, instead of the one of --task."""
    seeds: int = Field(default=5, ge=1)
    """Seeds of each method on each task: 0, 1, ..."""
    lrs: Annotated[list[float], BeforeValidator(_split)] = Field(default_factory=list)
    """Learning rates that are tried for every method; by default 0.3, 1 and 3 times that of --lr. One: no tuning."""
    tuning_seeds: int = Field(default=2, ge=1)
    """Seeds of each learning rate; they are others than the reported ones."""
    budget_unit: Literal["rollouts", "tokens", "steps"] | None = None
    """What all methods get the same number of, also counting what a method makes and does not train on: rollouts or
    tokens, by default rollouts; on environments their steps."""
    budget: int = Field(default=0, ge=0)
    """Units of a run; 0: those of --iterations of the first method."""
    threshold: float | None = None
    """Held-out score that counts as reached once three evaluations in a row have it; by default 0.8, on environments the
    return at which they count as solved, if they say."""
    evaluations: int = Field(default=20, ge=2)
    """Held-out scores of a run, unless --score-every says otherwise."""

    @model_validator(mode="after")
    def _consistent(self) -> "CompareConfig":
        for name in ("methods", "tasks", "lrs"):
            values = getattr(self, name)
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"{name}: {twice!r} is there twice")
        if any(lr <= 0 for lr in self.lrs):
            raise ValueError(f"lrs = {self.lrs}: must be above 0")
        return self


class Comparison(NamedTuple):
    """A comparison that can be run."""

    config: CompareConfig
    base: RunConfig
    """What all runs share."""
    resolved: dict[tuple[str, str], RunConfig]
    """By task and method."""
    sizes: dict[str, int | None]
    """By method, the units of an iteration; None if that is not known beforehand."""
    unit: str
    """Of the budget."""
    out: Path

    @property
    def budget(self) -> int:
        """Units of a run."""
        return self.config.budget or self.base.trainer.iterations * (self.sizes[self.methods[0]] or 0)

    @property
    def thresholds(self) -> dict[str, float]:
        """By task, the score that counts as reached."""
        given = self.config.threshold
        own = DOMAINS[self.base.domain].threshold
        return {task: own(task) if given is None else given for task in self.tasks}

    @property
    def methods(self) -> list[str]:
        """The methods, in order."""
        return list(dict.fromkeys(method for _, method in self.resolved))

    @property
    def tasks(self) -> list[str]:
        """The tasks, in order."""
        return list(dict.fromkeys(task for task, _ in self.resolved))

    @property
    def lrs(self) -> list[float]:
        """The grid."""
        lr = self.base.trainer.lr
        return self.config.lrs or [float(f"{factor * lr:.3g}") for factor in LR_FACTORS]

    @property
    def tuning_seeds(self) -> list[int]:
        """Seeds that learning rates are compared on."""
        return list(range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)) if len(self.lrs) > 1 else []

    def folder(self, task: str, method: str, lr: float, seed: int) -> Path:
        """The run's folder."""
        return self.out / "runs" / slug(task) / slug(method) / f"lr-{lr:g}" / f"seed-{seed}"

    def job(self, task: str, method: str, lr: float, seed: int) -> Job:
        """The run."""
        config = self.resolved[task, method]
        t = config.trainer
        # where it is not known a rollout has one unit at least, and the run ends by what it has used
        iterations = math.ceil(self.budget / (self.sizes[method] or t.prompts * t.rollouts))
        every = t.score_every or max(1, round(iterations / self.config.evaluations))
        own = {"lr": lr, "seed": seed, "iterations": iterations, "score_every": every}
        trainer = config.trainer.model_copy(update=own)
        run = config.model_copy(update={"trainer": trainer, "out": self.folder(task, method, lr, seed)})
        return {
            "config": run.model_dump(mode="json"), "unit": self.unit, "budget": self.budget
        }  # fmt: skip

    def to_toml(self) -> str:
        """The file that `polopt compare` makes the same comparison from."""
        own = self.config.model_dump(exclude_none=True)
        own |= {"methods": self.methods, "lrs": self.lrs, "tasks": self.tasks}
        lines = [f"{name} = {json.dumps(value)}" for name, value in own.items()]
        run = to_toml(self.base, only_set=True).strip()
        return "\n".join([run, "", "[compare]", *lines]).lstrip() + "\n"

    def size(self) -> str:
        """How much there is to do, in words."""
        pairs, c = len(self.resolved), self.config
        tuning = pairs * len(self.lrs) * len(self.tuning_seeds)
        return (
            f"{len(self.methods)} methods on {len(self.tasks)} tasks: {tuning} runs to tune the learning rate and "
            f"{pairs * c.seeds} reported ones of {self.budget} {self.unit}"
        )
