"""What a run leaves behind: its folder, its checkpoints, and the metrics it reports."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from polopt.engine import checkpoint
from polopt.engine.ranks import Ranks
from polopt.engine.run_folder import RunFolder, strict


class Reporter(Protocol):
    """Gets everything a run reports, as it comes."""

    def start(self, description: dict[str, Any], iteration: int) -> None:
        """The run begins, or continues after `iteration` iterations."""
        ...

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """An iteration is done."""
        ...

    def message(self, text: str) -> None:
        """Something a person should know."""
        ...

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is over."""
        ...


class Resumable(Protocol):
    """A run's state."""

    iteration: int

    def state_dict(self) -> dict[str, Any]:
        """The whole state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        ...


class Record:
    """The writing side of a run. Only the main rank writes; all ranks read.

    Args:
        out: run folder; None writes nothing.
        description: the run's configuration.
        keep: checkpoints that are kept.
        reporters: get every metric.
        ranks: the processes of the run.
    """

    def __init__(
        self,
        out: Path | str | None,
        description: dict[str, Any],
        keep: int,
        reporters: Sequence[Reporter],
        ranks: Ranks,
    ) -> None:
        self.out = None if out is None else Path(out)
        self.description, self.keep, self.ranks = description, keep, ranks
        self.reporters = list(reporters) if ranks.is_main else []
        self.folder: RunFolder | None = None
        self._saved: int | None = None

    @property
    def fingerprint(self) -> str:
        """Identifies the run's configuration in its checkpoints, without the length and place of the run."""
        fixed = json.dumps(strict(_without_length(self.description), "config"), sort_keys=True)
        return hashlib.sha256(fixed.encode()).hexdigest()

    @contextmanager
    def open(self, run: Resumable, resume: bool) -> Iterator[Self]:
        """Lock the folder, and continue from its newest intact checkpoint if asked to."""
        with ExitStack() as stack:
            if self.out is not None and self.ranks.is_main:
                self.folder = stack.enter_context(RunFolder.open(self.out))
            if resume and self.out is not None:
                self._load(run)
            elif self.folder is not None:
                self.folder.write_config(self.description)
            for reporter in self.reporters:
                reporter.start({**self.description, "ranks": self.ranks.describe()}, run.iteration)
                if self.ranks.world > 1:
                    reporter.message(f"Ranks: {self.ranks.describe()}")
                if self.folder is not None and self.folder.recovered:
                    reporter.message(f"The run folder was left by {self.folder.recovered}")
            yield self

    def log(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Metrics and samples of an iteration."""
        if self.folder is not None:
            self.folder.log_metrics(iteration, metrics)
            self.folder.log_samples(iteration, samples)
        for reporter in self.reporters:
            reporter.log(iteration, metrics)

    def save(self, run: Resumable) -> None:
        """A checkpoint, if there is none of this iteration yet. Every rank takes part in gathering the state."""
        if self.out is None or self._saved == run.iteration:
            return
        self._saved = run.iteration
        state = run.state_dict()
        if self.folder is not None:
            checkpoint.save(self.folder.checkpoints, state, keep=self.keep, fingerprint=self.fingerprint)

    def finish(
        self, iteration: int, before: dict[str, Any], after: dict[str, Any], interrupted: bool
    ) -> dict[str, Any]:
        """The summary, written and returned."""
        summary = {"iteration": iteration, "before": before, "after": after, "interrupted": interrupted}
        if self.out is not None:
            summary["out"] = str(self.out)
        if self.folder is not None:
            self.folder.write_summary(summary)
        for reporter in self.reporters:
            reporter.finish(summary)
        return summary

    def _load(self, run: Resumable) -> None:
        assert self.out is not None
        state, path, damaged = checkpoint.load_newest(self.out / "checkpoints", fingerprint=self.fingerprint)
        for bad, reason in damaged:
            for reporter in self.reporters:
                reporter.message(f"checkpoint {bad.name} is damaged ({reason}); continuing from {path.name}")
        run.load_state_dict(state)
        if self.folder is not None:
            self.folder.truncate(run.iteration)
            self.folder.update_config(self.description)


def _without_length(description: dict[str, Any]) -> dict[str, Any]:
    trainer = {
        k: v
        for k, v in description.get("trainer", {}).items()
        if k not in ("iterations", "keep", "ranks", "sharding")
    }
    return {k: v for k, v in description.items() if k not in ("out", "trackers")} | {"trainer": trainer}
