"""The battery: a method against every law, one result each."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from polopt import registry
from polopt.errors import PoloptError
from polopt.method import Method
from polopt.parts import MANY, AdvantageTransform, Part
from polopt.testing import laws_of_invariance, laws_of_state, laws_of_values  # noqa: F401 (they fill LAWS)
from polopt.testing.laws import LAWS, Law
from polopt.testing.subject import Subject


@dataclass(frozen=True)
class Result:
    """What one check found."""

    name: str
    passed: bool
    message: str = ""
    """What is wrong and where; or what the method refused to do, which is allowed on unusual data."""


@dataclass(frozen=True)
class Report:
    """What the battery found of a method."""

    name: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> tuple[Result, ...]:
        """The checks that did not pass."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def passed(self) -> bool:
        """No check failed."""
        return not self.failures

    def __str__(self) -> str:
        passed = len(self.results) - len(self.failures)
        lines = [f"{self.name}: {passed} of {len(self.results)} checks passed"]
        return "\n".join([*lines, *(f"  {result.name}: {result.message}" for result in self.failures)])


def check_method(
    subject: str | Method | Part,
    *,
    columns: int = 1,
    only: Collection[str] = tuple(LAWS),
    raise_on_failure: bool = True,
) -> Report:
    """Run the battery on a method.

    Args:
        subject: name of a recipe, a method, or a part. A part is checked inside the first recipe that has one of its
            class, else inside GRPO.
        columns: number of reward functions it is made for.
        only: names of the checks to run; all of them if not given.
        raise_on_failure: raise if a check fails.

    Returns:
        One result for each check.

    Raises:
        AssertionError: a check failed; the message has one line for each.
        ConfigError: there is no such recipe, or the part fits into no method by itself.

    Example:
        >>> print(check_method("grpo"))  # doctest: +ELLIPSIS
        grpo: ... checks passed
    """
    method = _method(subject)
    tested = Subject(method, columns)
    report = Report(method.name, tuple(_results(tested, {name: LAWS[name] for name in only})))
    if raise_on_failure and not report.passed:
        raise AssertionError(str(report))
    return report


def _results(subject: Subject, laws: dict[str, Law]) -> Iterator[Result]:
    for name, law in laws.items():
        try:
            law.check(subject)
        except AssertionError as error:
            yield Result(name, False, f"{law.statement} {error}")
        except PoloptError as error:
            yield Result(name, law.unusual, f"refused: {error}")
        except Exception as error:  # whatever a method under test raises is a finding
            yield Result(name, False, f"{type(error).__name__}: {_first_line(error)}")
        else:
            yield Result(name, True)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _method(subject: str | Method | Part) -> Method:
    if isinstance(subject, str):
        return registry.recipe(subject)
    if isinstance(subject, Method):
        return subject
    made = (recipe() for recipe in registry.recipes().values())
    home = next((method for method in made if any(type(p) is type(subject) for p in method.parts)), None)
    return _with_part(home or registry.recipe("grpo"), subject)


def _with_part(method: Method, part: Part) -> Method:
    """The method with the part in place of one of its class, or added where a slot takes several."""
    filling = method.slot(part.slot)
    if any(type(p) is type(part) for p in filling):
        filling = [part if type(p) is type(part) else p for p in filling]
    elif isinstance(part, AdvantageTransform) or part.slot in MANY - {"advantage"}:
        filling = [*filling, part]
    else:
        filling = [part]
    return method.with_parts(**{part.slot: filling if part.slot in MANY else filling[0]})
