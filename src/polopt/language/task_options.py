"""Options of the kinds of language tasks."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Self, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, create_model, model_validator

from polopt.language.builtin_tasks import Builtin
from polopt.language.task import SYSTEM_PROMPT, Style
from polopt.settings import Settings

Options = TypeVar("Options", bound="TaskOptions")


class TaskOptions(Settings):
    """Options of every task."""

    seed: int = Field(0, ge=0)
    """Seed of the questions and of the split; not the run's seed."""
    shots: int = Field(4, ge=1, le=64)
    """Demonstrations in a prompt of the style "few_shot"."""
    system_prompt: str = SYSTEM_PROMPT
    """System message of the style "chat"; empty for none."""
    extract: str | None = None
    """Where the final answer is: last_number, first_line, whole, boxed, tag:NAME or regex:PATTERN. By default the first
    line for "few_shot", tag:answer for "chat", the last number or the whole for "plain"."""
    rewards: tuple[str, ...] = ()
    """Further rewards beside the task's own, one column each: python:FILE:FUNCTION, or a verifier's name."""
    timeout: float = Field(10.0, gt=0)
    """Seconds that scoring one completion may take in a worker process."""
    workers: int | None = Field(None, ge=1)
    """Scoring processes; as many as there are processors (at most 8) by default."""
    in_process: bool = False
    """Call reward functions of your own in the training process: quick, but a hang or crash there ends the run."""


class BuiltinOptions(TaskOptions):
    """Options of `builtin:NAME`; `count` and `digits`, whose defaults are the task's, are added."""

    style: Style = "few_shot"
    """How a question becomes a prompt."""
    train_size: int = Field(10_000, ge=1)
    """Training prompts; questions may repeat among them."""
    heldout_size: int | None = Field(None, ge=1)
    """Held-out questions; by default 128, or a quarter of the different questions if that is fewer."""


class ReasoningGymOptions(TaskOptions):
    """Options of `reasoning_gym:NAME`; the generator's own are added."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    style: Style = "few_shot"
    """How a question becomes a prompt."""
    train_size: int = Field(10_000, ge=1)
    """Training prompts; questions may repeat among them."""
    heldout_size: int = Field(64, ge=1)
    """Held-out questions."""
    partial_credit: bool = False
    """Graded scores of the generator's scorer; otherwise full marks are 1 and all else is 0."""


class RowOptions(TaskOptions):
    """Options of the tasks made of rows."""

    style: Style | None = None
    """How a question becomes a prompt; by default "chat" for chat messages and "plain" for text."""
    prompt_column: str = "prompt"
    """Column of the prompt: text or chat messages."""
    answer_column: str = "answer"
    """Column of the reference answer."""
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the different prompts that is held out, chosen by hash, if there is no held-out set."""
    verifier: str = "numeric"
    """How to score: exact, numeric, math, format or python:FILE:FUNCTION; several, separated by commas, give several
    rewards."""
    abs_tol: float = Field(0.0, ge=0)
    """Absolute tolerance of the verifier "numeric"."""
    rel_tol: float = Field(0.0, ge=0)
    """Tolerance of the verifier "numeric" relative to the reference."""

    def refuse_fraction_beside(self, heldout: str) -> Self:
        """Raise ValueError if the held-out rows are both given and to be split off."""
        if getattr(self, heldout) is not None and "heldout_fraction" in self.model_fields_set:
            raise ValueError(f"heldout_fraction has no effect beside {heldout}; give one of them")
        return self


class JsonlOptions(RowOptions):
    """Options of `jsonl:FILE`."""

    heldout: str | None = None
    """File of held-out rows; training rows with one of its prompts are left out."""

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        return self.refuse_fraction_beside("heldout")


class DatasetOptions(RowOptions):
    """Options of `dataset:DIR`."""

    split: str = "train"
    """Split to train on, if the directory has splits."""
    heldout_split: str | None = None
    """Split of held-out rows; training rows with one of its prompts are left out."""

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        return self.refuse_fraction_beside("heldout_split")


class PythonOptions(RowOptions):
    """Options of `python:FILE:FUNCTION`; the function's own parameters are added."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


def with_fields(model: type[Options], fields: dict[str, tuple[Any, Any]]) -> type[Options]:
    """The model with further or redefined fields, as pairs (type, default)."""
    no_source = {"use_attribute_docstrings": False}
    return create_model(model.__name__, __base__=model, __cls_kwargs__=no_source, **fields)  # type: ignore[call-overload]


def builtin_fields(builtin: Builtin) -> dict[str, tuple[Any, Any]]:
    """The parameters of a built-in task."""
    count = Field(builtin.count, ge=1, le=100, description="Numbers in a question.")
    digits = Field(builtin.digits, ge=1, le=9, description="Digits of each number.")
    return {"count": (int, count), "digits": (int, digits)}


def dataclass_fields(config: type) -> dict[str, tuple[Any, Any]]:
    """A generator's parameters from its configuration class, without seed and size."""
    hints, fields = get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if field.name in ("seed", "size"):
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else Field(default_factory=made)
        fields[field.name] = (hints[field.name], ... if default is dataclasses.MISSING else default)
    return fields


def function_fields(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The parameters of a user's function that are not options already."""
    fields = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if (
            parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            or name in PythonOptions.model_fields
        ):
            continue
        untyped = parameter.annotation is parameter.empty or isinstance(parameter.annotation, str)
        kind = Any if untyped else parameter.annotation
        fields[name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    return fields


def describe_fields(model: type[TaskOptions]) -> list[dict[str, Any]]:
    """Name, type, default and meaning of every option, as JSON."""
    described = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        kind = getattr(field.annotation, "__name__", None) if isinstance(field.annotation, type) else None
        described.append({
            "name": name,
            "type": kind or str(field.annotation).replace("typing.", ""),
            "default": plain(default),
            "description": " ".join((field.description or "").split()),
        })  # fmt: skip
    return described


def plain(value: Any) -> Any:
    """A value as JSON."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
