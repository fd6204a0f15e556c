"""One process writes a run's folder; what it wrote is whole, strict JSON, and never past where the run is."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polopt.engine import run_folder
from polopt.engine.run_folder import RunFolder, read_metrics
from polopt.errors import ConfigError, PoloptError


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# The lock

HOLD = """
import os, sys, time
from polopt.engine.run_folder import RunFolder
with RunFolder.open(sys.argv[1]):
    child = os.fork() if "fork" in sys.argv else 0
    if "fork" in sys.argv and child == 0:
        time.sleep(600)
    print(child, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the folder until it reads a line; and the process it has forked."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(path), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_of_the_first_until_it_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        for _ in range(2):
            with pytest.raises(
                ConfigError, match=f"process {process.pid} on .* .since .* is writing here.*--out"
            ):
                RunFolder.open(tmp_path).__enter__()
        assert strict((tmp_path / "lock").read_text())["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunFolder.open(tmp_path) as run:
            assert run.recovered and run.recovered.startswith(
                f"process {process.pid} on {os.uname().nodename}"
            )
            assert strict((tmp_path / "lock").read_text())["pid"] == os.getpid()
        with RunFolder.open(tmp_path) as run:
            assert run.recovered is None


def test_a_process_that_ends_properly_leaves_nothing_to_recover(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        process.communicate("\n")
        assert process.returncode == 0
    with RunFolder.open(tmp_path) as run:
        assert run.recovered is None


def test_a_worker_that_outlives_a_killed_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (process, worker):
        try:
            process.kill()
            process.wait()
            os.kill(worker, 0)
            with RunFolder.open(tmp_path) as run:
                assert run.recovered
        finally:
            os.kill(worker, signal.SIGKILL)


def test_one_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        RunFolder.open(tmp_path).__enter__()
    with RunFolder.open(tmp_path):
        pass


def test_refusals_leave_no_descriptor_open(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(ConfigError):
                RunFolder.open(tmp_path).__enter__()
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_full_disk_is_named_and_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(PoloptError, match="lock: No space left"):
            RunFolder.open(tmp_path).__enter__()
    with RunFolder.open(tmp_path):
        pass


def test_the_lock_goes_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder.open(tmp_path):
        _ = 1 / 0
    with RunFolder.open(tmp_path) as run:
        assert run.recovered is None


@pytest.mark.parametrize("content", ["noise", "[]", '{"pid": 1}', "[" * 100_000])
def test_a_lock_file_of_noise_is_recovered(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with RunFolder.open(tmp_path) as run:
        assert run.recovered == "a process that left no name"
        assert strict((tmp_path / "lock").read_text())["pid"] == os.getpid()


WRITES: list[Callable[[RunFolder], None]] = [
    lambda run: run.write_config({}),
    lambda run: run.log_metrics(1, {}),
    lambda run: run.log_samples(1, [{}]),
    lambda run: run.write_summary({}),
]


@pytest.mark.parametrize("write", WRITES)
def test_only_an_open_folder_is_written(tmp_path: Path, write: Callable[[RunFolder], None]) -> None:
    with RunFolder.open(tmp_path) as run:
        write(run)
    there = sorted(tmp_path.iterdir())
    (tmp_path / "config.json").unlink(missing_ok=True)
    for closed in (run, RunFolder(tmp_path)):
        with pytest.raises(ConfigError, match="not open for writing"):
            write(closed)
    assert sorted(tmp_path.iterdir()) == [path for path in there if path.name != "config.json"]


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="cannot be a run folder"):
            RunFolder.open(path).__enter__()


# Configuration and summary


def test_the_configuration_comes_back_and_the_folders_are_named(tmp_path: Path) -> None:
    config = {
        "seed": 3,
        "name": "Übung \udc80",
        "lr": 1e-5,
        "parts": [{"x": None}],
        "on": True,
        "clip": math.inf,
    }
    with RunFolder.open(tmp_path / "runs" / "first") as run:
        run.write_config(config)
        assert run.read_config() == config | {"clip": "Infinity"}
    assert RunFolder(str(run.path)).read_config()["seed"] == 3
    assert run.checkpoints == tmp_path / "runs" / "first" / "checkpoints"
    assert strict((run.path / "config.json").read_text())["clip"] == "Infinity"


def test_a_new_run_is_refused_where_there_is_one(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        run.write_config({"seed": 1})
    with RunFolder.open(tmp_path) as run:
        with pytest.raises(ConfigError, match="`polopt resume`, or choose another --out"):
            run.write_config({"seed": 2})
        assert run.read_config() == {"seed": 1}


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"a": 1', "\udcff", "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        RunFolder(tmp_path).read_config()


def test_the_summary_is_replaced(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        run.write_summary({"score": math.nan})
        run.write_summary({"score": 1.0, "samples": [{"text": "NaN"}]})
    assert strict((tmp_path / "summary.json").read_text()) == {"score": 1.0, "samples": [{"text": "NaN"}]}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with RunFolder.open(tmp_path) as run:
        run.write_summary({"score": 1})
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, step, fail)
            with pytest.raises(PoloptError, match=r"summary\.json: No space left"):
                run.write_summary({"score": 2, "more": "x" * 1000})
        assert strict((tmp_path / "summary.json").read_text()) == {"score": 1}
        run.write_summary({"score": 3})
    assert strict((tmp_path / "summary.json").read_text()) == {"score": 3}


def test_a_replaced_file_is_on_the_disk_before_it_is_relied_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    replace, fsync = os.replace, os.fsync

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", name_of(fd))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", a.name)), replace(a, b)))
    with RunFolder.open(tmp_path) as run:
        run.write_summary({})
    assert calls == [
        ("fsync", ".summary.json.tmp"),
        ("replace", ".summary.json.tmp"),
        ("fsync", tmp_path.name),
    ]


# Metrics and samples


def test_metrics_come_back_one_line_per_iteration(tmp_path: Path) -> None:
    logged = [{"reward": 0.1 + 0.2, "count": 3, "note": "a\nb\u2028"}, {"reward": -math.inf, "up": math.inf}]
    with RunFolder.open(tmp_path) as run:
        for iteration, values in enumerate(logged, 1):
            run.log_metrics(iteration, values)
            assert read_metrics(tmp_path)[-1] == {"iteration": iteration, **values}
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert len(lines) == 2 and all(line.isascii() for line in lines)
    assert strict(lines[1].decode()) == {"iteration": 2, "reward": "-Infinity", "up": "Infinity"}


@given(
    st.lists(
        st.dictionaries(st.text().filter("iteration".__ne__), st.floats() | st.integers() | st.booleans())
    )
)
def test_any_metrics_come_back(
    tmp_path_factory: pytest.TempPathFactory, logged: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("run")
    with RunFolder.open(path) as run:
        for iteration, values in enumerate(logged):
            run.log_metrics(iteration, values)
    expected = [{"iteration": iteration, **values} for iteration, values in enumerate(logged)]
    assert repr(read_metrics(path)) == repr(expected)
    assert all(map(strict, (path / "metrics.jsonl").read_text().splitlines()) if logged else [True])


def test_a_folder_without_metrics_has_none_and_no_folder_is_an_error(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with pytest.raises(ConfigError, match="no such run folder"):
        read_metrics(tmp_path / "misspelt")


def test_samples_are_lines_that_cannot_speak_to_a_terminal(tmp_path: Path) -> None:
    samples = [
        {"prompt": "1+1", "answer": "\x1b[31m2\n\udc80", "rewards": [math.nan, 1.0]},
        {"prompt": "NaN"},
    ]
    with RunFolder.open(tmp_path) as run:
        run.log_samples(4, samples)
        run.log_samples(5, [])
    content = (tmp_path / "samples.jsonl").read_bytes()
    assert content.isascii() and b"\x1b" not in content
    assert [strict(line.decode()) for line in content.splitlines()] == [
        {"iteration": 4, **samples[0], "rewards": ["NaN", 1.0]},
        {"iteration": 4, **samples[1]},
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"a": {"b": [1, object()]}}, "iteration 3, a, b, 1: a object is not JSON"),
        ({"a": {1: 2}}, "iteration 3, a: a dict"),
        ({"a": b""}, "iteration 3, a: a bytes"),
        ({"iteration": 4}, '"iteration": the name is taken'),
    ],
    ids=lambda case: None if isinstance(case, dict) else str(case),
)
def test_what_is_not_json_is_named_and_not_written(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    with RunFolder.open(tmp_path) as run:
        run.log_samples(1, [{}])
        with pytest.raises(ConfigError, match=named):
            run.log_samples(3, [{"fine": 1}, values])
    assert (tmp_path / "samples.jsonl").read_text() == '{"iteration": 1}\n'


def logged_run(path: Path) -> list[dict[str, Any]]:
    with RunFolder.open(path) as run:
        for iteration in range(1, 6):
            run.log_metrics(iteration, {"reward": iteration / 3})
            run.log_samples(iteration, [{"n": 0}, {"n": 1}])
    return read_metrics(path)


@pytest.mark.parametrize("iteration", [0, 3, 5, 9])
def test_truncation_drops_what_is_later(tmp_path: Path, iteration: int) -> None:
    whole = logged_run(tmp_path)
    with RunFolder.open(tmp_path) as run:
        run.truncate(iteration)
        run.truncate(iteration)
        assert read_metrics(tmp_path) == whole[:iteration]
        assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2 * min(iteration, 5)
        run.log_metrics(iteration + 1, {"reward": 9})
    assert read_metrics(tmp_path) == [*whole[:iteration], {"iteration": iteration + 1, "reward": 9}]
    assert not list(tmp_path.glob(".*"))


def test_truncation_of_an_empty_folder_leaves_it_empty(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        run.truncate(0)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_line_cut_anywhere_is_left_out_and_gone_after_truncation(tmp_path: Path) -> None:
    whole = logged_run(tmp_path)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    with RunFolder.open(tmp_path) as run:
        for cut in range(1, last):
            (tmp_path / "metrics.jsonl").write_bytes(content[:-cut])
            assert read_metrics(tmp_path) == whole[:-1]
            run.truncate(5)
            assert (tmp_path / "metrics.jsonl").read_bytes() == content[:-last]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", '{"reward": 1}', '{"iteration": "1"}', "\udcff", "[" * 100_000, '{"a": 1}{"b": 2}'],
)
def test_a_line_that_is_none_of_a_run_is_named(tmp_path: Path, line: str) -> None:
    logged_run(tmp_path)
    damaged = b'{"iteration": 1}\n' + line.encode(errors="surrogateescape") + b'\n{"iteration": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(PoloptError, match=r"metrics\.jsonl, line 2: .*remove the line"):
        read_metrics(tmp_path)
    with RunFolder.open(tmp_path) as run, pytest.raises(PoloptError, match="line 2"):
        run.truncate(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == damaged
