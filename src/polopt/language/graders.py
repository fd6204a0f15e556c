"""Ways to grade a final answer.

Graders that run code which can hang (math-verify, reasoning-gym's scorers, the user's functions) run it in worker
processes; see `reward_workers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.errors import ConfigError, MissingExtraError
from polopt.language.answers import canonical, normalize, parse_number
from polopt.language.examples import Example
from polopt.language.reward_workers import RewardFaults, RewardPool
from polopt.language.worker_process import FunctionSource


class Row(NamedTuple):
    """One completion to grade."""

    completion: str
    final: str | None
    """The extracted answer."""
    example: Example


class Grader(ABC):
    """One way to grade, giving one column of rewards or more."""

    names: tuple[str, ...]
    needs_answer = True
    """Whether examples must have a reference answer."""

    @abstractmethod
    def grade(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "N K"], RewardFaults]:
        """Rewards of the rows."""

    def canonical(self, final: str) -> str:
        """The one spelling of answers that this grader holds equal."""
        return canonical(final)

    def check(self, answer: str) -> None:
        """Raise ConfigError if a reference answer cannot be graded against."""

    def close(self) -> None:
        """End worker processes."""


class _Immediate(Grader):
    """A grader that is one quick pure function."""

    @abstractmethod
    def reward(self, final: str | None, answer: str) -> float:
        """The reward of a final answer, given the reference."""

    def grade(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "N K"], RewardFaults]:
        values = [[self.reward(row.final, row.example.answer)] for row in rows]
        return torch.tensor(values, dtype=torch.float64).reshape(len(rows), 1), RewardFaults(calls=len(rows))


class Exact(_Immediate):
    """1 if the answer is the reference, but for spacing and a full stop at the end."""

    names = ("exact",)

    def reward(self, final: str | None, answer: str) -> float:
        return float(final is not None and normalize(final) == normalize(answer))

    def canonical(self, final: str) -> str:
        return normalize(final)


class Format(_Immediate):
    """1 if there is a final answer, right or wrong."""

    names = ("format",)
    needs_answer = False

    def reward(self, final: str | None, answer: str) -> float:
        return float(final is not None)


class Numeric(_Immediate):
    """1 if the answer is a number `x` with `|x - reference| <= max(abs_tol, rel_tol |reference|)`; exact by default.

    Reads commas, signs, decimals, fractions, exponents, and amounts with $ or %.
    """

    names = ("numeric",)

    def __init__(self, abs_tol: float = 0.0, rel_tol: float = 0.0) -> None:
        for name, value in (("abs_tol", abs_tol), ("rel_tol", rel_tol)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} = {value}: must be a number >= 0")
        self._abs_tol, self._rel_tol = abs_tol, rel_tol

    def reward(self, final: str | None, answer: str) -> float:
        value, reference = parse_number(final or ""), parse_number(answer)
        if value is None or reference is None:
            return 0.0
        return float(abs(value - reference) <= max(self._abs_tol, self._rel_tol * abs(reference)))

    def check(self, answer: str) -> None:
        if parse_number(answer) is None:
            raise ConfigError(
                f"verifier = 'numeric': the answer {answer[:80]!r} is no number; use 'exact' or 'math'"
            )


class _Supervised(Grader):
    """A grader whose functions run in a `RewardPool`."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool
        self.names = pool.names

    def keywords(self, row: Row) -> dict[str, Any]:
        """What the functions are called with."""
        return {"completion": row.final, "answer": row.example.answer}

    def grade(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "N K"], RewardFaults]:
        """Rewards of the rows; without a final answer the reward is 0."""
        rewards = torch.zeros(len(rows), len(self.names), dtype=torch.float64)
        graded = [index for index, row in enumerate(rows) if row.final is not None]
        rewards[graded], faults = self._pool.score([self.keywords(rows[index]) for index in graded])
        return rewards, faults

    def close(self) -> None:
        self._pool.close()


class Math(_Supervised):
    """1 if the answer is mathematically equal to the reference (math-verify, symbolic).

    Args:
        timeout: seconds per answer.
        workers: number of worker processes; None for as many as there are processors.
    """

    def __init__(self, timeout: float = 10.0, workers: int | None = None) -> None:
        require("math_verify", "verifier = 'math'")
        source = FunctionSource("polopt.language.math_reward", "equal")
        super().__init__(RewardPool([source], timeout=timeout, workers=workers))
        self.names = ("math",)


class ReasoningGym(_Supervised):
    """The scorer of a reasoning-gym generator, applied to the extracted answer.

    Args:
        name: the generator's.
        options: the generator's.
        partial_credit: graded scores; otherwise full marks are 1 and all else is 0.
        timeout: seconds per answer.
        workers: number of worker processes; None for as many as there are processors.
    """

    needs_answer = False

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        partial_credit: bool = False,
        timeout: float = 10.0,
        workers: int | None = None,
    ) -> None:
        arguments = {"name": name, "options": options, "partial_credit": partial_credit}
        source = FunctionSource("polopt.language.reasoning_gym_reward", "scorer", arguments)
        super().__init__(RewardPool([source], timeout=timeout, workers=workers))
        self.names = ("score",)

    def keywords(self, row: Row) -> dict[str, Any]:
        return {"completion": row.final, "entry": row.example.metadata}


class Functions(_Supervised):
    """The user's reward functions, called with the whole completion; see `reward_workers` for their signature.

    Metadata called `completion`, `answer` or `prompt` are not passed.

    Args:
        pool: the functions.
    """

    needs_answer = False

    def keywords(self, row: Row) -> dict[str, Any]:
        example = row.example
        return example.metadata | {
            "completion": row.completion,
            "answer": example.answer,
            "prompt": example.prompt,
        }

    def grade(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "N K"], RewardFaults]:
        """Rewards of the rows, with or without a final answer."""
        return self._pool.score([self.keywords(row) for row in rows])


def require(module: str, purpose: str) -> None:
    """Raise MissingExtraError if a library of the language domain is not installed."""
    if find_spec(module) is None:
        raise MissingExtraError(
            f'{purpose}: needs {module}, which is not installed: pip install "polopt[language]"'
        )
