"""Small arithmetic and list questions that a 100M-parameter model learns in minutes."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb, perm
from random import Random

from polopt.errors import ConfigError
from polopt.language.examples import Example


@dataclass(frozen=True)
class Builtin:
    """One kind of question about a few numbers."""

    name: str
    summary: str
    question: Callable[[Sequence[int]], str]
    answer: Callable[[Sequence[int]], str]
    count: int = 4
    """Numbers in a question, unless asked otherwise."""
    digits: int = 2
    """Digits of each number, unless asked otherwise."""
    ordered: bool = False
    """Whether the same numbers in another order are another question."""
    repeats: bool = False
    """Whether a number may occur twice."""

    def key(self, example: Example) -> Hashable:
        """Equal for questions about the same numbers (in the same order, where order matters)."""
        numbers = example.metadata["numbers"]
        return tuple(numbers if self.ordered else sorted(numbers))

    def different(self, count: int, digits: int) -> int:
        """How many different questions there are.

        Raises:
            ConfigError: none, because there are fewer numbers than a question has.
        """
        values = len(_numbers(digits))
        if self.repeats:
            return values**count if self.ordered else comb(values + count - 1, count)
        if count > values:
            raise ConfigError(
                f"builtin:{self.name}.count = {count}: there are only {values} numbers of {digits} digits"
            )
        return perm(values, count) if self.ordered else comb(values, count)

    def generator(self, count: int, digits: int, seed: int) -> Callable[[int], Example]:
        """The question of each index, the same for the same seed."""
        numbers = _numbers(digits)

        def generate(index: int) -> Example:
            random = Random(f"{self.name}/{count}/{digits}/{seed}/{index}")
            drawn = random.choices(numbers, k=count) if self.repeats else random.sample(numbers, count)
            return Example(index, self.question(drawn), self.answer(drawn), {"numbers": drawn})

        return generate


def _numbers(digits: int) -> range:
    return range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


_ALL = (
    Builtin(
        "largest",
        "the largest of a few numbers",
        lambda numbers: f"largest of {_listed(numbers)}",
        lambda numbers: str(max(numbers)),
    ),
    Builtin(
        "smallest",
        "the smallest of a few numbers",
        lambda numbers: f"smallest of {_listed(numbers)}",
        lambda numbers: str(min(numbers)),
    ),
    Builtin(
        "sort",
        "a few numbers in order",
        lambda numbers: f"sort {_listed(numbers)}",
        lambda numbers: _listed(sorted(numbers)),
        count=3,
    ),
    Builtin(
        "reverse",
        "a few numbers backwards",
        lambda numbers: f"reverse {_listed(numbers)}",
        lambda numbers: _listed(numbers[::-1]),
        count=3,
        digits=1,
        ordered=True,
    ),
    Builtin(
        "add",
        "the sum of a few numbers",
        lambda numbers: f"{' + '.join(map(str, numbers))} =",
        lambda numbers: str(sum(numbers)),
        count=2,
        digits=1,
        repeats=True,
    ),
)
BUILTINS = {builtin.name: builtin for builtin in _ALL}
"""The built-in tasks by name."""
