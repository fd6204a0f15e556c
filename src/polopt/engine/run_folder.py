"""The folder of a run: who writes it, with which configuration, and what came out.

    RUN/
      lock            the process that writes, while it does
      config.json     the resolved configuration
      metrics.jsonl   one line per iteration
      samples.jsonl   one line per sample
      summary.json    scores before and after
      checkpoints/    see `polopt.engine.checkpoint`

All of it is strict JSON in ASCII. JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity"
and "-Infinity", which pydantic takes for numbers and `read_metrics` turns back into them.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from polopt.engine.checkpoint import sync_folder, write_file
from polopt.errors import ConfigError, PoloptError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunFolder:
    """A run's folder, to read; `RunFolder.open` gives it to one process to write.

    Args:
        path: the run's folder; it need not exist to be named.

    Attributes:
        path: the folder.
        recovered: the process that wrote here before and did not end properly, in words; None if there is none.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recovered: str | None = None
        self._lock: int | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @classmethod
    @contextmanager
    def open(cls, path: Path | str) -> Iterator[Self]:
        """Makes the folder if need be and locks it for this process; the lock goes when the process ends, however.

        Processes forked from this one do not hold the lock and cannot write.

        Raises:
            ConfigError: if another process writes in the folder, naming it, or if the folder cannot be written.

        Example:
            >>> with RunFolder.open("runs/first") as run:  # doctest: +SKIP
            ...     run.write_config({"seed": 0})
            ...     run.log_metrics(1, {"reward": 0.5})
        """
        run = cls(path)
        try:
            run._acquire()
            yield run
        finally:
            run._release()

    def write_config(self, config: dict[str, Any]) -> None:
        """Starts a new run: writes `config.json`.

        Raises:
            ConfigError: if the folder holds a run already, or a value is not JSON.
        """
        if (self.path / "config.json").exists():
            raise ConfigError(
                f"{self.path}: holds a run already; continue it by `polopt resume`, or choose another --out"
            )
        self.update_config(config)

    def update_config(self, config: dict[str, Any]) -> None:
        """Rewrites `config.json` of a run that continues with other lengths.

        Raises:
            ConfigError: if a value is not JSON.
        """
        self._replace("config.json", [_json(config, "config")])

    def read_config(self) -> dict[str, Any]:
        """The run's configuration, as JSON has it.

        Raises:
            ConfigError: if there is no run in the folder, or its configuration cannot be read.
        """
        file = self.path / "config.json"
        try:
            return _parse(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"{self.path}: holds no run, config.json: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{file}: not a JSON object, {error}") from error

    def log_metrics(self, iteration: int, values: Mapping[str, float | int | str]) -> None:
        """Appends one line to `metrics.jsonl`.

        Raises:
            ConfigError: if a value is not JSON, or one is called "iteration".
        """
        self._append("metrics.jsonl", [_json_line(iteration, dict(values))])

    def log_samples(self, iteration: int, samples: list[dict[str, Any]]) -> None:
        """Appends one line per sample to `samples.jsonl`.

        Raises:
            ConfigError: if a value is not JSON, or one is called "iteration".
        """
        self._append("samples.jsonl", [_json_line(iteration, sample) for sample in samples])

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`, in place of an earlier one.

        Raises:
            ConfigError: if a value is not JSON.
        """
        self._replace("summary.json", [_json(summary, "summary")])

    def truncate(self, iteration: int) -> None:
        """Drops the metrics and samples of later iterations, and a last line that was cut off in writing.

        Raises:
            PoloptError: naming the file and the line that is not one of a run.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.path / name).exists():
                lines = _read_lines(self.path / name)
                self._replace(name, (line for line, record in lines if record["iteration"] <= iteration))

    def _append(self, name: str, lines: list[bytes]) -> None:
        with self._writing(name) as path, open(path, "ab") as file:
            file.write(b"".join(lines))

    def _replace(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file so that at any time the old one or the new one is there, whole."""
        with self._writing(name) as path:
            temporary = path.with_name(f".{name}.tmp")
            write_file(temporary, chunks)
            os.replace(temporary, path)
            sync_folder(self.path)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        if self._lock is None:
            raise ConfigError(f"{self.path}: not open for writing in this process; use RunFolder.open")
        try:
            yield self.path / name
        except OSError as error:
            raise PoloptError(f"{self.path / name}: {error.strerror or error}") from error

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be a run folder, {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _describe(lock) or "another process"
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise ConfigError(f"{self.path}: cannot be locked, {error.strerror}") from error
            remedy = "wait for it, stop it, or choose another --out"
            raise ConfigError(f"{self.path}: {holder} is writing here; {remedy}") from error
        self.recovered = _describe(lock)
        self._lock = lock
        os.register_at_fork(after_in_child=self._forget)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": os.uname().nodename, "started": started}
        with self._writing("lock"):
            os.ftruncate(lock, 0)
            os.pwrite(lock, _json(holder, "lock"), 0)

    def _release(self) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            self._forget()

    def _forget(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The metrics of a run, also while it is written: a line that is not complete yet is left out.

    Args:
        path: the run's folder.

    Returns:
        One dict per logged line, in order: `iteration` and the values; [] if nothing has been logged.

    Raises:
        ConfigError: if there is no such folder.
        PoloptError: naming the line that is not one of a run.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"{path}: no such run folder")
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    return [
        {k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
        for _, record in _read_lines(file)
    ]


def _read_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = _parse(line)
                if not isinstance(record.get("iteration"), int):
                    raise ValueError("no iteration")
            except ValueError as error:
                raise PoloptError(f"{file}, line {number}: {error}; remove the line to go on") from error
            yield line, record


def _parse(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _json_line(iteration: int, values: dict[str, Any]) -> bytes:
    if "iteration" in values:
        raise ConfigError('"iteration": the name is taken; log it under another')
    return _json({"iteration": iteration, **values}, f"iteration {iteration}")


def _json(value: Any, where: str) -> bytes:
    return json.dumps(strict(value, where), allow_nan=False).encode() + b"\n"


def strict(value: Any, where: str) -> Any:
    """The value as strict JSON can hold it, numbers that are not finite as strings.

    Raises:
        ConfigError: naming `where` something lies that JSON cannot hold.
    """
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [strict(item, f"{where}, {i}") for i, item in enumerate(value)]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: strict(item, f"{where}, {key}") for key, item in value.items()}
    raise ConfigError(
        f"{where}: a {type(value).__name__} is not JSON; use numbers, strings, lists and dicts (keys str)"
    )


def _describe(lock: int) -> str | None:
    """The process that a lock file names, in words; None if it is empty."""
    content = os.pread(lock, 4096, 0)
    try:
        return "process {pid} on {host} (since {started})".format(**_parse(content)) if content else None
    except (ValueError, KeyError):
        return "a process that left no name"
