"""Validated settings: frozen, no unknown keys, and a bad value is one line that names field, value and remedy."""

import tomllib
from difflib import get_close_matches
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from polopt.errors import ConfigError


class Settings(BaseModel):
    """Base of every configuration in the library.

    Raises:
        ConfigError: unknown key, wrong type, value out of range or impossible combination.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigError(
                explain(type(self), type(self).__qualname__, _clearest(error.errors()))
            ) from None

    # so that pydantic validates settings inside settings itself, and knows where in the whole an error is
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @classmethod
    def create(cls, where: str, /, **options: Any) -> Self:
        """Validated settings.

        Args:
            where: what the options belong to, for the message ("surrogate ppo").
            **options: the fields.

        Raises:
            ConfigError: unknown key, wrong type, value out of range or impossible combination.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise ConfigError(explain(cls, where, _clearest(error.errors()))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if _passes_for_a_number(value, cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("takes no boolean")
        return value


def _passes_for_a_number(value: Any, annotation: Any) -> bool:
    """Whether the value, or one in the list that it is, is a boolean where the annotation means a number."""
    types = {annotation, *get_args(annotation)}
    if isinstance(value, bool):
        return bool(types & {int, float}) and bool not in types
    items = [kind for of in types if get_origin(of) is list for kind in get_args(of)]
    return isinstance(value, list) and any(_passes_for_a_number(v, kind) for v in value for kind in items)


def _clearest(errors: list[ErrorDetails]) -> ErrorDetails:
    """An unknown key first: it may be the misspelt name of one that seems missing."""
    return min(errors, key=lambda error: error["type"] != "extra_forbidden")


def nearest(word: str, allowed: list[str]) -> str:
    """The words to choose from, with the nearest one first if any is near."""
    close = get_close_matches(word, allowed, 1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(allowed) or 'none'}"


def parse_options(spec: str, text: str) -> dict[str, Any]:
    """The options of a part's spec: values as in TOML, and what is not TOML as text.

    Raises:
        ConfigError: an option is not KEY=VALUE.
    """
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{spec!r}: {item!r} is not key=value; write name:key=value,key=value")
        try:
            options[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = value.strip()
    return options


def explain(model: type[BaseModel], where: str, error: ErrorDetails) -> str:
    """One line for one validation error."""
    path = ".".join(str(part) for part in error["loc"])
    field = f"{where}.{path}" if where and path else where or path
    if error["type"] == "extra_forbidden":
        owner = _owner(model, error["loc"][:-1])
        return f"{field}: unknown key; {nearest(str(error['loc'][-1]), sorted(owner.model_fields))}"
    if error["type"] == "missing":
        return f"{field}: required, and not given"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{field} = {error['input']!r}: {reason}" if path else f"{field}: {reason}"


def _owner(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return model
