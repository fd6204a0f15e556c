"""The whole configuration of a run. From Python and from a TOML file:

    config = RunConfig.create("", method="ppo", trainer={"iterations": 20}, language={"temperature": 0.8})
    config = configure(read_toml(Path("run.toml")))

Nothing here imports torch, so that a bad configuration is refused at once.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from polopt.control.config import ControlConfig
from polopt.engine.tracking import TRACKERS
from polopt.errors import ConfigError
from polopt.language.config import LanguageConfig
from polopt.miniature_config import MiniatureConfig
from polopt.settings import Settings, explain, nearest
from polopt.trainer_config import TrainerConfig

SECTIONS: dict[str, type[Settings]] = {
    "trainer": TrainerConfig,
    "language": LanguageConfig,
    "control": ControlConfig,
    "miniature": MiniatureConfig,
}
"""Tables of a configuration file. Besides the trainer's there is one for each domain."""
DOMAIN_DEFAULTS: dict[str, dict[str, Any]] = {
    "miniature": {"task": "miniature:mixed", "trainer": {"lr": 0.03}},
    "control": {
        "task": "CartPole-v1",
        "trainer": {"lr": 3e-4, "iterations": 50, "max_grad_norm": 0.5, "score_prompts": 16},
    },
}
"""By domain: defaults that are other than those of the fields. A method's own go before those of the trainer."""
MANY_SLOTS = ("shaping", "advantage", "regularizers")
SLOTS = ("sampler", "budget", "selection", "surrogate", "optimizer", *MANY_SLOTS)
_SHOWN = 80
"""Characters of a refused value that a message repeats."""

_listed = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Several = Annotated[list[str], _listed]
"""A list of texts, for which one text alone will do."""
SeveralOrNone = Annotated[list[str] | None, _listed]


class RunConfig(Settings):
    """What is trained, on what, by which method."""

    domain: Literal["language", "control", "miniature"] = "language"
    """What the policy acts on."""
    method: str = "grpo"
    """Recipe: a published method, see `polopt methods`."""
    sampler: str | None = None
    """Part that chooses the prompts, in place of the recipe's: NAME or NAME:KEY=VALUE,KEY=VALUE."""
    budget: str | None = None
    """Part that shares out the rollouts, in place of the recipe's."""
    shaping: SeveralOrNone = None
    """Parts that shape the rewards, in place of the recipe's."""
    advantage: SeveralOrNone = None
    """Advantage estimator and the transforms after it, in place of the recipe's."""
    selection: str | None = None
    """Part that selects trajectories and decisions, in place of the recipe's."""
    surrogate: str | None = None
    """Loss, in place of the recipe's."""
    regularizers: SeveralOrNone = None
    """Parts that are added to the loss, in place of the recipe's."""
    optimizer: str | None = None
    """Optimizer, in place of the recipe's."""
    task: str = "builtin:largest"
    """Task: builtin:NAME, reasoning_gym:NAME, jsonl:FILE, dataset:DIR, python:FILE:FUNCTION or miniature:NAME; see `polopt tasks`."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task; `polopt tasks --json` lists them."""
    reward: Several = Field(default_factory=list)
    """Further reward functions, python:FILE:FUNCTION."""
    out: Path | None = None
    """Run folder; runs/METHOD-TASK-NUMBER if not given."""
    trackers: Several = Field(default_factory=list)
    """Trackers that get the metrics, besides the run folder: tensorboard, trackio, wandb, ..."""
    plugins: list[Path] = Field(default_factory=list)
    """Python files with methods of your own; they are imported."""
    trainer: TrainerConfig = TrainerConfig()
    """Sizes and lengths."""
    language: LanguageConfig = LanguageConfig.create("language")
    """Model and sampling."""
    control: ControlConfig = ControlConfig.create("control")
    """Policy over the actions of an environment."""
    miniature: MiniatureConfig = MiniatureConfig()
    """The small network of the miniature tasks."""

    @property
    def slots(self) -> dict[str, Any]:
        """The slots that are filled with other parts than the recipe's."""
        return {slot: filling for slot in SLOTS if (filling := getattr(self, slot)) is not None}

    @model_validator(mode="wrap")
    @classmethod
    def _defaults_of_the_domain(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        domain = values.get("domain") if isinstance(values, dict) else None
        defaults = DOMAIN_DEFAULTS.get(domain, {}) if isinstance(domain, str) else {}
        filled, left_open = values, set()
        for name, default in defaults.items():
            given = values.get(name, {} if isinstance(default, dict) else default)
            filled = {**filled, name: {**default, **given} if isinstance(given, dict) else given}
            left_open |= set(default) - set(given) if name == "trainer" and isinstance(given, dict) else set()
        made = validate(filled)
        made.trainer.model_fields_set.difference_update(left_open)  # so that a method's own defaults go first
        return made

    @field_validator("advantage")
    @classmethod
    def _advantage_has_an_estimator(cls, advantage: list[str] | None) -> list[str] | None:
        if advantage == []:
            raise ValueError("name an estimator, or leave the field out for the recipe's")
        return advantage

    @field_validator("task_options")
    @classmethod
    def _options_are_plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
            if not plain:
                raise ValueError(f"{name!r} must be a text, a finite number or a boolean")
        return options

    @field_validator("trackers")
    @classmethod
    def _trackers_exist(cls, trackers: list[str]) -> list[str]:
        for name in trackers:
            if name not in TRACKERS:
                raise ValueError(f"{name!r} is unknown; {nearest(name, list(TRACKERS))}")
        return trackers

    @field_validator("out")
    @classmethod
    def _folder_can_exist(cls, out: Path | None) -> Path | None:
        if out is not None and "\0" in str(out):
            raise ValueError("must not contain the character NUL")
        return out

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        t = self.trainer
        if self.language.warm_up and self.language.lora_rank:
            raise ValueError(
                f"language.warm_up = {self.language.warm_up}: a warm-up is of all weights; set language.lora_rank = 0"
            )
        if t.minibatches > t.prompts * t.rollouts and self.domain != "control":
            raise ValueError(
                f"trainer.minibatches = {t.minibatches}: more than the rollouts of an iteration, "
                f"prompts * rollouts = {t.prompts * t.rollouts}"
            )
        if self.domain == "language" and t.score_rollouts > 1 and not self.language.score_temperature:
            raise ValueError(
                f"trainer.score_rollouts = {t.score_rollouts}: greedy completions of a prompt are all the same; "
                "set language.score_temperature above 0, or score_rollouts = 1"
            )
        return self


def configure(
    values: Mapping[str, Any], flags: Mapping[tuple[str, ...], str] | None = None, where: str = ""
) -> RunConfig:
    """A validated configuration.

    Args:
        values: fields, those of the sections as nested mappings.
        flags: for fields that came from the command line, the flag by the field's path, for messages.
        where: what the values were read from, for messages.

    Raises:
        ConfigError: unknown key, wrong type, value out of range or impossible combination; one line that names it.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_refusal(error.errors()[0], flags or {}, where)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a configuration file.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file, {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file, {error}") from None


def to_toml(config: RunConfig, only_set: bool = False) -> str:
    """The configuration as a TOML file that `polopt train` takes.

    Args:
        config: the configuration. Fields that are None are left out.
        only_set: leave out the fields that nobody has set, so that a method's own defaults still count.
    """
    values = config.model_dump(mode="json", exclude_none=True, exclude_unset=only_set)
    tables = {name: values.pop(name, {}) for name in ("task_options", *SECTIONS)}
    blocks = [_toml_lines(values)]
    blocks += [[f"[{name}]", *_toml_lines(table)] for name, table in tables.items() if table]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _toml_lines(values: dict[str, Any]) -> list[str]:
    return [f"{_toml_key(name)} = {_toml_value(value)}" for name, value in values.items()]


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float) and math.isinf(value):
        return str(value)  # TOML has infinity, JSON has not
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _refusal(error: ErrorDetails, flags: Mapping[tuple[str, ...], str], where: str) -> str:
    """One line for a validation error; a field that a flag set goes by the flag's name."""
    path = tuple(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        message = f"{'.'.join(path)}: unknown key; {_nearest_key(path)}"
    elif error["type"] == "value_error" and path and path[-1] in SECTIONS:
        message = f"{path[-1]}.{error['msg'].removeprefix('Value error, ')}"
    else:
        message = explain(RunConfig, "", {**error, "input": _short(error["input"])}).removeprefix(": ")
    for field, flag in flags.items():
        if re.match(re.escape(".".join(field)) + r"\b", message):
            return flag + message.removeprefix(".".join(field))
    return f"{where}: {message}" if where else message


def _nearest_key(path: tuple[str, ...]) -> str:
    """The key that was meant: one of the same table if any is near, or one of another table."""
    *tables, key = path
    model = SECTIONS[tables[0]] if tables and tables[0] in SECTIONS else RunConfig
    here = list(model.model_fields)
    if not get_close_matches(key, here, 1, cutoff=0.75):
        for table, section in [("", RunConfig), *SECTIONS.items()]:
            if near := get_close_matches(key, list(section.model_fields), 1, cutoff=0.75):
                place = f"in the table [{table}]" if table else "before the first table"
                return f"did you mean {near[0]!r} {place}?"
    return nearest(key, here)


def _short(value: Any) -> Any:
    """The value, or its beginning as text if it is long."""
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    size = len(repr(value))
    return value if size <= _SHOWN else f"a {type(value).__name__} of {size} characters"
