"""What a law is: a function that raises AssertionError with where it does not hold."""

from collections.abc import Callable
from dataclasses import dataclass

from polopt.testing.subject import Subject


@dataclass(frozen=True)
class Law:
    """A check with its name's long form."""

    check: Callable[[Subject], None]
    statement: str
    unusual: bool
    """Its data may be refused with a PoloptError."""


LAWS: dict[str, Law] = {}
"""The battery: all laws by name, in the order of their files."""


def law(unusual: bool = False) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Adds a check to the battery under its function's name; the docstring is what it says if it fails."""

    def add(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        LAWS[check.__name__] = Law(check, " ".join((check.__doc__ or "").split()), unusual)
        return check

    return add
