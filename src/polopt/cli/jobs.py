"""Many runs in processes that fill the cores. Each is a run folder of its own; what is done is not done again.

A process takes one JSON object a line, `{"config": ..., "unit": ..., "budget": ...}`, makes the run with one thread and
answers in one line, `{"status": "done" | "interrupted" | "failed", "error": ...}`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

Job = dict[str, Any]
Outcome = dict[str, str]
COST = "cost.json"
"""File of a run folder with the CPU seconds that the run took."""
_WAIT = 0.2
"""Seconds between looks at whether the user interrupts."""


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end: its summary says so."""
    try:
        return json.loads((run / "summary.json").read_bytes())["interrupted"] is False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def cpu_seconds(run: Path) -> float:
    """CPU seconds of a run's training and scoring so far; 0 if it never came to a stop."""
    try:
        return float(json.loads((run / COST).read_bytes())["cpu_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def run_all(jobs: Sequence[Job], processes: int) -> Generator[tuple[Job, Outcome], None, None]:
    """Make the runs, each job's outcome as it comes. Closed early, it stops the runs so that they can be resumed.

    Args:
        jobs: see the module's description.
        processes: how many run at the same time.
    """
    waiting: SimpleQueue[Job] = SimpleQueue()
    outcomes: SimpleQueue[tuple[Job, Outcome]] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    workers = [_Worker(waiting, outcomes) for _ in range(min(processes, len(jobs)))]
    try:
        for worker in workers:
            worker.start()
        left = len(jobs)
        while left:
            with suppress(Empty):
                yield outcomes.get(timeout=_WAIT)
                left -= 1
    finally:
        while not waiting.empty():
            with suppress(Empty):
                waiting.get_nowait()
        for worker in workers:
            worker.interrupt()
        for worker in workers:
            worker.join()


class _Worker(Thread):
    """Feeds one process, and starts another where that has died."""

    def __init__(self, waiting: SimpleQueue[Job], outcomes: SimpleQueue[tuple[Job, Outcome]]) -> None:
        super().__init__(daemon=True)
        self.waiting, self.outcomes = waiting, outcomes
        self.process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Jobs until none is waiting."""
        while True:
            try:
                job = self.waiting.get_nowait()
            except Empty:
                break
            self.outcomes.put((job, self._ask(job)))
        self._end()

    def interrupt(self) -> None:
        """Stop the present run after its iteration."""
        process = self.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)

    def _ask(self, job: Job) -> Outcome:
        if self.process is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "polopt.cli.jobs"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,  # an interrupt at the terminal reaches it through this process alone
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._end()
        return {"status": "failed", "error": f"the process ended with code {code}"}

    def _end(self) -> int:
        if self.process is None:
            return 0
        process, self.process = self.process, None
        with suppress(BrokenPipeError):
            process.communicate()
        return process.returncode


class _BudgetUsedError(Exception):
    """The run has made as many units as it may."""


class _Meter:
    """A reporter that ends the run when its budget is used up, if that is before its last iteration."""

    def __init__(self, run: Path, unit: str, budget: float, iterations: int) -> None:
        self.run, self.unit, self.budget, self.iterations = run, unit, budget, iterations
        self.used = 0.0

    def start(self, description: dict[str, Any], iteration: int) -> None:
        """Count what earlier parts of the run have used."""
        from polopt.engine.run_folder import read_metrics

        self.used = sum(line[self.unit] for line in read_metrics(self.run))

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Count an iteration."""
        self.used += metrics[self.unit]
        if self.used >= self.budget and iteration < self.iterations:
            raise _BudgetUsedError

    def message(self, text: str) -> None:
        """Nobody reads it."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The summary is in the run folder."""


class _Counted:
    """An actor that reports all that it makes for training in an iteration, whatever becomes of it.

    Rollouts that a sampler only scores or turns down count, and those that an update makes by itself.
    """

    def __init__(self, actor: Any, unit: str) -> None:
        self._actor, self._unit, self._made = actor, unit, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)

    def rollout(self, task: Any, plan: Any, generator: Any) -> Any:
        """The actor's rollout, counted unless it is of the held-out split."""
        found = self._actor.rollout(task, plan, generator)
        if not plan.heldout:
            made = plan.counts if self._unit == "rollouts" else found.batch.mask
            self._made += float(made.sum())
        return found

    def observe(self, batch: Any) -> dict[str, float]:
        """The actor's own metrics, and what was made in the iteration."""
        made, self._made = self._made, 0.0
        return {**self._actor.observe(batch), self._unit: made}


def make_run(job: Job) -> Outcome:
    """One run, continued from its checkpoint if there is one, until its budget is used up."""
    from polopt.cli.building import assemble, prepare
    from polopt.config import configure

    config = configure(job["config"])
    assert config.out is not None
    run, resume = config.out, any((config.out / "checkpoints").glob("iteration-*"))
    if run.exists() and not resume:
        shutil.rmtree(run)  # ended before its first checkpoint
    meter = _Meter(run, job["unit"], job["budget"], config.trainer.iterations)
    trainer = assemble(prepare(config), [meter], run)
    started = time.process_time()
    counted: Any = _Counted(trainer.actor, job["unit"])
    trainer.actor = counted
    with closing(trainer.task):
        try:
            interrupted = trainer.run(resume)["interrupted"]
        except _BudgetUsedError:
            _finish_early(trainer, run)
            interrupted = False
        finally:
            _add_cost(run, time.process_time() - started)
    return {"status": "interrupted" if interrupted else "done"}


def _finish_early(trainer: Any, run: Path) -> None:
    from polopt.engine import checkpoint
    from polopt.engine.run_folder import RunFolder

    summary = {"iteration": trainer.iteration, "before": trainer.before, "after": trainer.score()}
    with RunFolder.open(run) as folder:
        keep, fingerprint = trainer.config.keep, trainer.record.fingerprint
        checkpoint.save(folder.checkpoints, trainer.state_dict(), keep=keep, fingerprint=fingerprint)
        folder.write_summary({**summary, "interrupted": False, "out": str(run)})


def _add_cost(run: Path, seconds: float) -> None:
    (run / COST).write_text(json.dumps({"cpu_seconds": cpu_seconds(run) + seconds}) + "\n")


def _serve() -> None:
    """Answer the jobs of standard input; what a run prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run sets its own handler
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            outcome = make_run(json.loads(line))
        except KeyboardInterrupt:
            outcome = {"status": "interrupted"}
        except Exception as error:
            outcome = {
                "status": "failed",
                "error": " ".join(f"{type(error).__name__}: {error}".split())[:500],
            }
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
