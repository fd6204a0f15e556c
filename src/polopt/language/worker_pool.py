"""A pool of worker processes with hard deadlines, for functions that may hang, crash or leak processes.

The parent owns the deadlines: a worker that misses one is killed with its whole session and everything it started,
and a new one takes its place. A worker also dies with the parent, however that ends. This contains faults of code that
the user chose to run; it is no sandbox against hostile code.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Self

from polopt.errors import ConfigError, PoloptError
from polopt.language import worker_process
from polopt.language.worker_process import FunctionSource

Call = tuple[int, dict[str, Any]]
"""Index of the function to call, and its keywords."""
_STALL_SECONDS = 5
"""How long a ready worker may take to accept a call, or to finish sending an answer it has begun."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call."""

    kind: Literal["value", "timeout", "error", "died", "malformed"]
    value: float | str | None = None
    message: str = ""

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> Self:
        """The outcome a worker reports."""
        if "value" in reply:
            return cls("value", reply["value"])
        if "error" in reply:
            return cls("error", message=reply["error"])
        return cls("malformed", message=f"returned {reply.get('malformed')}")


class _Worker:
    """One process, its socket, and what it is doing: starting (not ready), idle (no call) or busy."""

    def __init__(self, sources: Sequence[FunctionSource], startup_timeout: float) -> None:
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", worker_process.__file__, str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline), start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )  # fmt: skip
        except OSError:
            ours.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STALL_SECONDS, 0))
        self.connection = Connection(ours.detach())
        self.ready = False
        self.call: int | None = None
        self.deadline = time.monotonic() + startup_timeout
        with suppress(OSError):  # a worker that is dead already is noticed when its answer is awaited
            self.connection.send((sys.path, [vars(source) for source in sources]))

    def take(self, call: int, timeout: float) -> None:
        """Become busy."""
        self.call, self.deadline = call, time.monotonic() + timeout

    def rest(self) -> None:
        """Become idle."""
        self.ready, self.call, self.deadline = True, None, inf

    def receive(self) -> dict[str, Any] | None:
        """The worker's message; None if it died or talks nonsense."""
        try:
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def last_words(self) -> str:
        """How the process ended."""
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the worker closed its channel"
        if status < 0:
            return f"killed by signal {-status} ({signal.strsignal(-status)})"
        return f"exited with status {status}"

    def kill(self) -> None:
        """End the process and everything it started, and release what belongs to it."""
        started = _descendants(self.process.pid)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_STALL_SECONDS)
        self.connection.close()
        os.close(self._lifeline)


class WorkerPool:
    """Runs functions in worker processes, each call under a hard deadline.

    May be used from any thread; concurrent runs take turns. Workers start when needed and stay for the next run.

    Args:
        sources: the functions, called by index.
        timeout: seconds that one call may take; loading the functions does not count.
        workers: largest number of processes; as many as there are processors (at most 8) if None.
        startup_timeout: seconds that starting a process and loading the functions may take.
    """

    def __init__(
        self,
        sources: Sequence[FunctionSource],
        *,
        timeout: float,
        workers: int | None = None,
        startup_timeout: float = 60.0,
    ) -> None:
        if not 0 < timeout < inf:
            raise ConfigError(f"timeout = {timeout}: must be a positive number of seconds")
        if workers is not None and workers < 1:
            raise ConfigError(f"workers = {workers}: must be at least 1")
        self.sources = tuple(sources)
        self.timeout = timeout
        self.size = workers or min(os.cpu_count() or 1, 8)
        self._startup_timeout = startup_timeout
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def start(self) -> None:
        """Start one worker.

        Raises:
            ConfigError: the functions cannot be loaded; names the first one, its module and the reason.
        """
        with self._lock:
            failure = self._grow(1)
            while not failure and not any(worker.ready for worker in self._workers):
                failure = next((outcome.message for _, outcome in self._events()), "")
        if failure:
            source = self.sources[0]
            raise ConfigError(f"{source.module}: cannot load function {source.function!r}: {failure}")

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Make all calls, in parallel; each outcome depends on its own call alone.

        A call that hangs, raises or ends its process costs itself only and is not repeated. If no worker can be
        started any more, the calls left are "died".

        Args:
            calls: pairs (index of the function, keywords).

        Returns:
            One outcome per call, in their order.

        Raises:
            PoloptError: the pool is closed.
        """
        outcomes = [Outcome("died")] * len(calls)
        waiting = deque(range(len(calls)))
        failure = ""
        with self._lock:
            try:
                while waiting or any(worker.call is not None for worker in self._workers):
                    failure = failure or self._grow(len(waiting))
                    if not self._workers:
                        break
                    for index, outcome in [*self._hand_out(calls, waiting), *self._events()]:
                        if index is None:
                            failure = outcome.message
                        else:
                            outcomes[index] = outcome
            finally:
                for worker in [worker for worker in self._workers if worker.call is not None]:
                    self._discard(worker)
        for index in waiting:
            outcomes[index] = Outcome("died", message=f"no worker could be started: {failure}")
        return outcomes

    def close(self) -> None:
        """Kill all workers and what they started. The pool cannot be used afterwards."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grow(self, wanted: int) -> str:
        """Start workers until `wanted` are free or the pool is full; the reason if that failed."""
        if not self._finalizer.alive:
            raise PoloptError("the worker pool is closed")
        for worker in [worker for worker in self._workers if worker.ready and worker.call is None]:
            if worker.process.poll() is not None:
                self._discard(worker)
        free = sum(worker.call is None for worker in self._workers)
        try:
            for _ in range(min(wanted - free, self.size - len(self._workers))):
                self._workers.append(_Worker(self.sources, self._startup_timeout))
        except OSError as error:
            return worker_process.describe(error)
        return ""

    def _hand_out(self, calls: Sequence[Call], waiting: deque[int]) -> list[tuple[int, Outcome]]:
        """Give a call to every idle worker; outcomes of calls that could not be sent."""
        unsent = []
        for worker in [worker for worker in self._workers if worker.ready and worker.call is None]:
            while waiting and worker.call is None:
                call = waiting.popleft()
                worker.take(call, self.timeout)
                try:
                    worker.connection.send(calls[call])
                except OSError:
                    unsent += self._end(worker, Outcome("died", message=worker.last_words()))
                except Exception as error:  # a keyword that cannot be sent to another process
                    unsent.append((call, Outcome("error", message=worker_process.describe(error))))
                    worker.rest()
        return unsent

    def _events(self) -> list[tuple[int | None, Outcome]]:
        """Wait for the next answers, deaths and deadlines; (call, outcome), with call None for a failed start."""
        soonest = min((worker.deadline for worker in self._workers), default=inf)
        if soonest == inf:  # all are idle
            return []
        answered = wait([worker.connection for worker in self._workers], max(0.0, soonest - time.monotonic()))
        events = []
        for worker in list(self._workers):
            if worker.connection in answered:
                events += self._hear(worker)
            elif time.monotonic() >= worker.deadline:
                limit = self.timeout if worker.ready else self._startup_timeout
                events += self._end(worker, Outcome("timeout", message=f"no answer within {limit:g} s"))
        return events

    def _hear(self, worker: _Worker) -> list[tuple[int | None, Outcome]]:
        message = worker.receive()
        if message is None:
            return self._end(worker, Outcome("died", message=worker.last_words()))
        if "ready" in message and not worker.ready:
            worker.rest()
            return []
        outcome = Outcome.from_reply(message)
        if worker.call is None:  # a failed start, or words that nobody asked for
            return self._end(worker, outcome)
        call = worker.call
        worker.rest()
        return [(call, outcome)]

    def _end(self, worker: _Worker, outcome: Outcome) -> list[tuple[int | None, Outcome]]:
        """Get rid of a worker; its call, if it had one, and a failed start are events."""
        self._discard(worker)
        return [] if worker.ready and worker.call is None else [(worker.call, outcome)]

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of the process that owns them
        while workers:
            workers.pop().kill()


def _descendants(process: int) -> list[int]:
    """Processes below one, also those in sessions of their own (Linux; elsewhere the list is empty)."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in children.read_text().split()]
    return found + [below for child in found for below in _descendants(child)]
