"""Reward functions under supervision: a fault costs the row that caused it, is counted, and never ends the run.

A reward function scores one completion; it names only the keywords it uses:

    def reward(completion: str, answer: str, prompt: str | list, **metadata) -> float | None

`None` or NaN means that this reward does not apply to the row. One row per call, so that a row whose scoring hangs
costs itself alone; there are no retries. `async def` works too.
"""

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.errors import ConfigError
from polopt.language.worker_pool import Call, Outcome, WorkerPool
from polopt.language.worker_process import FunctionSource, accepted, answer_call, describe, reply_to

RewardFunction = Callable[..., Any] | FunctionSource
MAX_REWARD = 1e18
"""Rewards of larger magnitude count as infinite: the variance of a group would overflow in float32."""
_KEPT_MESSAGES = 3


@dataclass(frozen=True)
class RewardFaults:
    """What went wrong in a number of reward calls. Counts of different calls can be added."""

    calls: int = 0
    """Values asked for: rows times reward functions."""
    timeouts: int = 0
    """Calls that missed the deadline."""
    errors: int = 0
    """Calls that raised."""
    died: int = 0
    """Calls that ended their process."""
    malformed: int = 0
    """Calls that returned something else than a number or None."""
    infinite: int = 0
    """Calls that returned an infinity or a magnitude above `MAX_REWARD`."""
    missing: int = 0
    """Calls that returned None or NaN: the reward does not apply. Not a fault."""
    messages: tuple[str, ...] = ()
    """The first few messages, each starting with the name of the reward."""

    @property
    def total(self) -> int:
        """Number of faults."""
        return self.timeouts + self.errors + self.died + self.malformed + self.infinite

    def items(self) -> list[tuple[str, int]]:
        """All counts by name, for metrics."""
        return [(name, value) for name, value in vars(self).items() if name != "messages"]

    def __add__(self, other: "RewardFaults") -> "RewardFaults":
        both = Counter(dict(self.items())) + Counter(dict(other.items()))
        return RewardFaults(**both, messages=(self.messages + other.messages)[:_KEPT_MESSAGES])


class RewardPool:
    """Reward functions in worker processes, each call under a hard deadline.

    May be used from any thread. Close it, or use it as a context manager; it also closes at exit.

    Args:
        functions: reward functions: callables at the top level of a module or script, or where to find them. Their
            names name the rewards.
        timeout: seconds that one call may take; importing the functions' modules does not count.
        workers: largest number of processes; as many as there are processors (at most 8) if None.
        in_process: call the functions here instead, for trusted quick ones: any callable will do, async ones run
            concurrently under `timeout`, but nothing stops a sync one that hangs or crashes.

    Raises:
        ConfigError: a function is not where another process could find it, or two have the same name.

    Example:
        >>> def length(completion: str) -> float:
        ...     return float(len(completion))
        >>> with RewardPool([length], in_process=True) as pool:
        ...     rewards, faults = pool.score([{"completion": "four"}, {"completion": None}])
        >>> rewards[0, 0].item(), faults.errors
        (4.0, 1)
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        timeout: float = 10.0,
        workers: int | None = None,
        in_process: bool = False,
    ) -> None:
        self.names = tuple(f.function if isinstance(f, FunctionSource) else _name(f) for f in functions)
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ConfigError(f"reward {repeated[0]!r}: two functions have this name; rename one")
        if in_process:
            self._pool = None
            loaded = [_load(f) if isinstance(f, FunctionSource) else f for f in functions]
            self._run = lambda calls: _run_here(loaded, calls, timeout)
        else:
            sources = [f if isinstance(f, FunctionSource) else source_of(f) for f in functions]
            self._pool = WorkerPool(sources, timeout=timeout, workers=workers)
            self._run = self._pool.run

    def start(self) -> Self:
        """Load the functions now, in a first worker, instead of at the first call.

        Raises:
            ConfigError: they cannot be loaded.
        """
        if self._pool:
            self._pool.start()
        return self

    def score(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Float[Tensor, "N K"], RewardFaults]:
        """Score every row with every function.

        Args:
            rows: N rows of keywords: `completion`, `answer`, `prompt` and metadata.

        Returns:
            The rewards, float64, NaN where a reward does not apply or its call failed; and what failed.
        """
        width = len(self.names)
        calls: list[Call] = [(index, dict(row)) for row in rows for index in range(width)]
        values, kinds, messages = [], Counter[str](), []
        for (index, _), outcome in zip(calls, self._run(calls), strict=True):
            value, kind, message = _reward(outcome)
            values.append(value)
            kinds[kind] += 1
            if message and len(messages) < _KEPT_MESSAGES:
                messages.append(f"{self.names[index]}: {message}")
        del kinds["ok"]
        faults = RewardFaults(calls=len(calls), messages=tuple(messages), **kinds)
        return torch.tensor(values, dtype=torch.float64).reshape(len(rows), width), faults

    def close(self) -> None:
        """End the workers and everything they started."""
        if self._pool:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def source_of(function: Callable[..., Any]) -> FunctionSource:
    """Where another process finds a function.

    Raises:
        ConfigError: it is not at the top level of a module or script.
    """
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    if not name.isidentifier() or not file:
        raise ConfigError(
            f"reward {_name(function)!r}: a worker process cannot import it; define it with `def` at the top level of "
            "a .py file, or trust it and pass in_process=True"
        )
    return FunctionSource(file if module == "__main__" else module, name)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _load(source: FunctionSource) -> Callable[..., Any]:
    try:
        return source.load()
    except Exception as error:
        raise ConfigError(
            f"{source.module}: cannot load function {source.function!r}: {describe(error)}"
        ) from error


def _reward(outcome: Outcome) -> tuple[float, str, str]:
    """Value, field of `RewardFaults` ("ok" for none) and message of one outcome."""
    field = {"timeout": "timeouts", "error": "errors"}.get(outcome.kind, outcome.kind)
    if outcome.kind != "value":
        return math.nan, field, outcome.message
    if isinstance(outcome.value, str):
        return math.nan, "malformed", "returned a text"
    if outcome.value is None or math.isnan(outcome.value):
        return math.nan, "missing", ""
    if abs(outcome.value) > MAX_REWARD:
        return math.nan, "infinite", f"returned {outcome.value:g}"
    return outcome.value, "ok", ""


def _run_here(
    functions: Sequence[Callable[..., Any]], calls: Sequence[Call], timeout: float
) -> list[Outcome]:
    """Make the calls in this process: sync ones in order, then async ones together."""
    is_async = [asyncio.iscoroutinefunction(function) for function in functions]
    outcomes: dict[int, Outcome] = {}
    for position, (index, keywords) in enumerate(calls):
        if not is_async[index]:
            outcomes[position] = Outcome.from_reply(answer_call(functions[index], keywords))
    pending = [position for position in range(len(calls)) if position not in outcomes]

    async def gather() -> list[Outcome]:
        return await asyncio.gather(*(_await(functions[calls[p][0]], calls[p][1], timeout) for p in pending))

    if pending:
        with ThreadPoolExecutor(
            1
        ) as thread:  # a thread of its own: the caller's may already run an event loop
            outcomes.update(zip(pending, thread.submit(asyncio.run, gather()).result(), strict=True))
    return [outcomes[position] for position in range(len(calls))]


async def _await(function: Callable[..., Any], keywords: dict[str, Any], timeout: float) -> Outcome:
    try:
        async with asyncio.timeout(timeout):
            return Outcome.from_reply(reply_to(await function(**accepted(function, keywords))))
    except TimeoutError:
        return Outcome("timeout", message=f"no answer within {timeout:g} s")
    except (Exception, SystemExit) as error:
        return Outcome("error", message=describe(error))
