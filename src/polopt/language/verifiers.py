"""From completions to rewards: extract the final answer, grade it in one or more ways."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.errors import ConfigError
from polopt.language.answers import extractor
from polopt.language.examples import Example
from polopt.language.graders import Exact, Format, Functions, Grader, Math, Numeric, Row
from polopt.language.reward_workers import RewardFaults, RewardPool
from polopt.language.worker_pool import WorkerPool
from polopt.language.worker_process import FunctionSource
from polopt.settings import nearest


@dataclass(frozen=True)
class Scores:
    """What N completions are worth."""

    rewards: Float[Tensor, "N K"]
    """float64; NaN where a reward does not apply to the row or its function failed."""
    names: tuple[str, ...]
    """Names of the K rewards."""
    format_ok: Bool[Tensor, " N"]
    """Whether a final answer was found."""
    answers: tuple[str | None, ...]
    """The final answer in canonical spelling: equal answers are equal texts. None if there is none."""
    faults: RewardFaults = field(default_factory=RewardFaults)
    """What failed on the way."""


class Verifier:
    """Extracts the final answers of completions and grades them.

    Args:
        graders: each gives its own columns; the first one decides which answers count as equal.
        extract: where the final answer is, one of `answers.EXTRACTIONS`.
        timeout: seconds that a pattern of the user's own (`regex:`) may take per completion.

    Raises:
        ConfigError: unknown `extract`, two rewards of one name, or none.

    Example:
        >>> verifier = Verifier([Numeric()], extract="last_number")
        >>> verifier.score(["It is 1,000."], [Example(0, "10^3 = ?", "1000")]).rewards.tolist()
        [[1.0]]
    """

    def __init__(self, graders: Sequence[Grader], extract: str, timeout: float = 10.0) -> None:
        self.graders = tuple(graders)
        self.names = tuple(name for grader in graders for name in grader.names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"verifier: needs rewards of different names, not {', '.join(self.names) or 'none'}"
            )
        self._extract = extractor(extract)
        self._extraction_pool = None
        if extract.startswith("regex:"):
            source = FunctionSource("polopt.language.answers", "extractor", {"spec": extract})
            self._extraction_pool = WorkerPool([source], timeout=timeout, workers=1)

    def check(self, answer: str) -> None:
        """Raise ConfigError if a reference answer cannot be graded against."""
        for grader in self.graders:
            grader.check(answer)

    def score(self, completions: Sequence[str], examples: Sequence[Example]) -> Scores:
        """Score N completions of N examples (an example appears once per completion of it).

        Raises:
            ValueError: the numbers differ.
        """
        finals, faults = self._finals(completions)
        rows = [Row(*row) for row in zip(completions, finals, examples, strict=True)]
        columns = []
        for grader in self.graders:
            rewards, failed = grader.grade(rows)
            columns.append(rewards)
            faults += failed
        return Scores(
            rewards=torch.cat(columns, dim=1),
            names=self.names,
            format_ok=torch.tensor([final is not None for final in finals], dtype=torch.bool),
            answers=tuple(None if final is None else self.graders[0].canonical(final) for final in finals),
            faults=faults,
        )

    def close(self) -> None:
        """End all worker processes."""
        for grader in self.graders:
            grader.close()
        if self._extraction_pool:
            self._extraction_pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finals(self, completions: Sequence[str]) -> tuple[list[str | None], RewardFaults]:
        if not self._extraction_pool:
            return [self._extract(completion) for completion in completions], RewardFaults()
        outcomes = self._extraction_pool.run([(0, {"completion": completion}) for completion in completions])
        timeouts = sum(outcome.kind == "timeout" for outcome in outcomes)
        others = sum(outcome.kind not in ("value", "timeout") for outcome in outcomes)
        messages = tuple(f"extract: {outcome.message}" for outcome in outcomes if outcome.message)[:1]
        finals = [outcome.value if isinstance(outcome.value, str) else None for outcome in outcomes]
        return finals, RewardFaults(timeouts=timeouts, errors=others, messages=messages)


GRADERS = {
    "exact": "equal to the reference answer but for spacing",
    "numeric": "numerically equal, within abs_tol or rel_tol",
    "math": "mathematically equal (math-verify)",
    "format": "there is a final answer",
    "python:FILE:FUNCTION": "a reward function of your own",
}
"""The ways to grade, by spec."""


def make_graders(
    names: Sequence[str],
    *,
    abs_tol: float = 0.0,
    rel_tol: float = 0.0,
    timeout: float = 10.0,
    workers: int | None = None,
    in_process: bool = False,
) -> list[Grader]:
    """The graders of some specs.

    Args:
        names: specs of `GRADERS`, for example "math" or "python:rewards.py:brevity".
        abs_tol: for `numeric`.
        rel_tol: for `numeric`.
        timeout: seconds per call of a grader in a worker process.
        workers: processes per such grader; None for as many as there are processors.
        in_process: call the user's functions in this process: no protection from hangs and crashes.

    Raises:
        ConfigError: an unknown grader, or a function that cannot be loaded.
        MissingExtraError: math-verify is needed and not installed.
    """

    def grader(name: str) -> Grader:
        if name.startswith("python:"):
            pool = RewardPool([python_source(name)], timeout=timeout, workers=workers, in_process=in_process)
            return Functions(pool.start())
        if name not in GRADERS:
            raise ConfigError(f"verifier = {name!r}: unknown; {nearest(name, list(GRADERS))}")
        if name == "math":
            return Math(timeout, workers)
        return Numeric(abs_tol, rel_tol) if name == "numeric" else {"exact": Exact, "format": Format}[name]()

    return [grader(name) for name in names]


def python_source(spec: str) -> FunctionSource:
    """The function that `python:FILE:FUNCTION` names.

    Raises:
        ConfigError: not of that form.
    """
    file, _, function = spec.removeprefix("python:").rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"{spec!r}: write python:FILE.py:FUNCTION")
    return FunctionSource(file, function)
