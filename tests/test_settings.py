"""Settings are frozen and typed, and a bad value is one line that names field, value and remedy."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from polopt.errors import ConfigError
from polopt.settings import Settings


class Inner(Settings):
    """Nested options."""

    rate: float = Field(default=0.1, gt=0, le=1)
    """A share."""


class Outer(Settings):
    """Options."""

    count: int = Field(ge=1)
    """How many."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    inner: Inner = Inner()
    """More."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "run x.count: required, and not given"),
        ({"count": 0}, "run x.count = 0: "),
        ({"count": "many"}, "run x.count = 'many': "),
        ({"count": 1.5}, "run x.count = 1.5: "),
        ({"count": 1, "kind": "c"}, "run x.kind = 'c': should be 'a' or 'b'"),
        (
            {"count": 1, "kin": "a"},
            "run x.kin: unknown key; did you mean 'kind'? allowed: count, inner, kind",
        ),
        ({"count": 1, "inner": {"rate": 2}}, "run x.inner.rate = 2: "),
        (
            {"count": 1, "inner": {"rte": 2}},
            "run x.inner.rte: unknown key; did you mean 'rate'? allowed: rate",
        ),
        ({"count": 1, "inner": {"rate": float("nan")}}, "run x.inner.rate = nan: "),
        ({"count": 1, "inner": {"rate": float("inf")}}, "run x.inner.rate = inf: "),
        ({"count": 1, "inner": 3}, "run x.inner = 3: "),
    ],
)
def test_bad_values_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.create("run x", **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_good_values_are_kept_and_cannot_be_changed() -> None:
    made = Outer.create("run x", count=2, inner={"rate": 0.5})
    assert (made.count, made.kind, made.inner.rate) == (2, "a", 0.5)
    with pytest.raises(ValidationError):
        made.count = 3


def test_fields_are_described_by_the_sentence_below_them() -> None:
    assert Outer.model_fields["count"].description == "How many."


def test_python_gets_the_same_line_as_create_and_nested_settings_keep_their_place() -> None:
    with pytest.raises(ConfigError, match=r"^Inner.rate = 2: should be less than or equal to 1$"):
        Inner(rate=2)
    with pytest.raises(ConfigError, match=r"^Outer.inner.rate = 2: should be less than or equal to 1$"):
        Outer(count=1, inner={"rate": 2})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValidationError):
        Outer.model_validate({"count": 0})


class Numbers(Settings):
    """Fields that a boolean might pass for."""

    whole: int = 1
    """Integer."""
    share: float | None = None
    """Number."""
    either: bool | int = 0
    """Both."""
    several: list[int] | None = None
    """Integers."""
    flags: list[bool] = []
    """Booleans."""


@pytest.mark.parametrize("field", ["whole", "share"])
def test_booleans_are_no_numbers(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^part.{field} = True: takes no boolean$"):
        Numbers.create("part", **{field: True})
    assert Numbers(either=True).either is True


def test_booleans_are_no_numbers_of_a_list() -> None:
    with pytest.raises(ConfigError, match=r"^part.several = \[True, 64\]: takes no boolean$"):
        Numbers.create("part", several=[True, 64])
    assert Numbers(several=[1, 64], flags=[True]).flags == [True]
