"""What a person sees of a run: its progress, and at the end what came of it."""

import unicodedata
from collections import deque
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

NO_FAULTS = ("faults/calls", "faults/missing")
"""Counts that say nothing bad."""
_RECENT = 10
"""Iterations whose mean time the time left is judged by."""
_SHOWN = 160
"""Characters of a prompt or completion that are shown."""


class ProgressReporter:
    """Shows iteration, reward, tokens per second and time left; at the end scores and samples before and after.

    In a terminal there is one moving line, elsewhere a plain line for each iteration. Use it as a context manager, so
    that the terminal is left in order whatever happens.

    Args:
        console: where to show it.
        quiet: leave out the progress; messages and the summary stay.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console, self.quiet = console or Console(), quiet
        self._total, self._seconds = 0, deque[float](maxlen=_RECENT)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bar()

    def start(self, description: dict[str, Any], iteration: int) -> None:
        """Begin to show the progress."""
        self._total = int(description.get("trainer", {}).get("iterations", 0))
        if self.quiet or not self.console.is_terminal:
            return
        count, text = TextColumn("{task.completed:.0f}/{task.total:.0f}"), "{task.description}"
        self._bar = Progress(
            count, BarColumn(None), TextColumn(text, markup=False), console=self.console, refresh_per_second=2
        )
        self._bar.add_task("held-out score", total=self._total, completed=iteration)
        self._bar.start()

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Show an iteration."""
        self._seconds.append(metrics["time/iteration"])
        text = describe_iteration(metrics, self._time_left(iteration))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=iteration, description=text)
        elif not self.quiet:
            self.console.print(
                f"{iteration}/{self._total}  {text}", markup=False, highlight=False, soft_wrap=True
            )

    def message(self, text: str) -> None:
        """Show a message above the progress."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Show scores, samples and where the results are."""
        self._stop_bar()
        before, after = summary["before"], summary["after"]
        self.console.print(score_table({"before": before, "after": after} if after else {"before": before}))
        if samples := list(zip(before.get("samples", []), after.get("samples", []), strict=False)):
            self.console.print(sample_table(samples))
        if "out" in summary:
            files = "summary.json, metrics.jsonl, samples.jsonl, checkpoints/"
            self.message(f"Results: {summary['out']} ({files})")

    def _time_left(self, iteration: int) -> float:
        return (self._total - iteration) * sum(self._seconds) / len(self._seconds)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe_iteration(metrics: dict[str, float], seconds_left: float) -> str:
    """One line about an iteration: reward, held-out score and faults if there are any, tokens per second, time left."""
    parts = [f"reward {metrics['reward']:.3f}"]
    if "score" in metrics:
        parts.append(f"score {_with_interval(metrics, 'score')}")
    if "tokens" in metrics and metrics["time/iteration"] > 0:
        parts.append(f"{metrics['tokens'] / metrics['time/iteration']:.0f} tokens/s")
    if faults := sum(
        v for name, v in metrics.items() if name.startswith("faults/") and name not in NO_FAULTS
    ):
        parts.append(f"{faults:.0f} reward faults")
    parts.append(f"{timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)


def score_table(columns: dict[str, dict[str, Any]]) -> Table:
    """Every statistic of the held-out split with its 95 % interval, by column."""
    table = Table("held-out [95 % interval]", *columns)
    names = dict.fromkeys(name for scores in columns.values() for name in scores if f"{name}/low" in scores)
    for name in names:
        table.add_row(Text(name), *(Text(_with_interval(scores, name)) for scores in columns.values()))
    return table


def sample_table(samples: list[tuple[dict[str, Any], dict[str, Any]]]) -> Table:
    """Completions of the same prompts before and after; what they contain is shown, never obeyed."""
    table = Table("Prompt", "Completion before", "Completion after", show_lines=True)
    for old, new in samples:
        table.add_row(
            Text(_tail(_as_text(old["prompt"]))),
            Text(_head(_as_text(old["completion"]))),
            Text(_head(_as_text(new["completion"]))),
        )
    return table


def printable(text: str) -> str:
    r"""The text with line breaks, terminal escapes and other invisible characters spelled out, as in "\n" and "\x1b".

    Example:
        >>> printable("red: \x1b[31m")
        'red: \\x1b[31m'
    """
    return "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _as_text(value: Any) -> str:
    """A prompt or completion: text, chat messages (the last one counts), or whatever a domain shows."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", value)
    return value if isinstance(value, str) else str(value)


def _head(text: str) -> str:
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ...")


def _tail(text: str) -> str:
    """The last question of a prompt: what stands after the last line break but one."""
    last = "\n".join(text.rstrip().split("\n")[-2:])
    return printable(last if len(last) <= _SHOWN else f"... {last[-_SHOWN:]}")


def _with_interval(scores: dict[str, Any], name: str) -> str:
    if name not in scores:
        return "-"
    low, high = scores[f"{name}/low"], scores[f"{name}/high"]
    return f"{scores[name]:.3f} [{low:.3f}, {high:.3f}]"
