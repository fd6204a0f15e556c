"""A save leaves a complete checkpoint whenever it stops; a load sees every damage and names the file."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.engine import checkpoint
from polopt.engine.checkpoint import checkpoints, load, load_newest, save
from polopt.engine.serialization import to_files
from polopt.errors import CheckpointError, ConfigError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def state_of(iteration: int, mark: str = "") -> dict[str, Any]:
    return {
        "iteration": iteration,
        "model": {"w": torch.full((2, 3), float(iteration)), "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(iteration)}}, "betas": (0.9, 0.99)},
        "method": {"mark": mark, "best": float("-inf")},
    }


def content(state: dict[str, Any]) -> dict[str, bytes]:
    return {name: b"".join(chunks) for name, chunks in to_files(state).items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return content(a) == content(b)


def saved(folder: Path, *iterations: int, keep: int = 9) -> list[Path]:
    return [save(folder, state_of(iteration), keep, "run") for iteration in iterations]


def resign(path: Path, **changes: Any) -> None:
    """Changes a manifest as someone who knows its digest would."""
    manifest = json.loads((path / "manifest.json").read_bytes()) | changes
    manifest.pop("digest")
    (path / "manifest.json").write_bytes(checkpoint._manifest(manifest))


# What is written


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", state_of(123), 1, "run")
    assert path == tmp_path / "run" / "checkpoints" / "iteration-000123"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert same(load(path, "run"), state_of(123))
    newest = load_newest(path.parent)
    assert same(newest.state, state_of(123)) and newest.path == path and newest.damaged == []


def test_the_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 999_999, 1_000_000)
    assert [path.name for path in checkpoints(tmp_path)] == ["iteration-999999", "iteration-1000000"]
    assert load_newest(tmp_path).state["iteration"] == 1_000_000


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_k_are_kept(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=keep)
    assert [load(path)["iteration"] for path in checkpoints(tmp_path)] == [1, 2, 3, 4][-keep:]
    assert len(list(tmp_path.iterdir())) == keep


def test_a_save_replaces_its_own_iteration_and_the_course_that_was_left(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, 40)
    path = save(tmp_path, state_of(20, "again"), 2, "run")
    assert path.name == "iteration-000020"
    assert [load(path)["iteration"] for path in checkpoints(tmp_path)] == [10, 20]
    assert load_newest(tmp_path).state["method"]["mark"] == "again"


def test_what_a_killed_save_left_is_ignored_and_removed_by_the_next(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".iteration-000002.tmp")
    (tmp_path / "iteration-best").mkdir()
    (tmp_path / "notes.txt").touch()
    assert load_newest(tmp_path).path == path
    saved(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iteration-000001",
        "iteration-000003",
        "iteration-best",
        "notes.txt",
    ]


@pytest.mark.parametrize(("iteration", "keep"), [(1, 0), (-1, 1), (None, 1), (1.0, 1)])
def test_impossible_arguments_are_refused(tmp_path: Path, iteration: Any, keep: int) -> None:
    with pytest.raises(ConfigError, match="keep"):
        save(tmp_path / "new", {"iteration": iteration}, keep, "run")
    assert not (tmp_path / "new").exists()


def test_a_state_that_cannot_be_saved_leaves_the_disk_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state method\.f: a builtin_function"):
        save(tmp_path / "new", state_of(1) | {"method": {"f": print}}, 1, "run")
    assert not (tmp_path / "new").exists()


def test_checkpoints_of_format_1_stay_readable(tmp_path: Path) -> None:
    files = {
        "x.safetensors": b"8\x00\x00\x00\x00\x00\x00\x00"
        b'{"w":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}  \x01\x00\x02\x00',
        "state.json": b'{"iteration":7,"x":{"w":{"$tensor":"w"},"n":{"$items":[[0,{"$tuple":[{"$float":"inf"}]}]]}}}',
        "manifest.json": b'{"format":1,"iteration":7,"fingerprint":"run","files":{"x.safetensors":{"bytes":68,'
        b'"sha256":"c983af1c38efd52af51e1096f69b6cf515cf837b8ded771a53e0d4743095c585"},"state.json":{"bytes":92,'
        b'"sha256":"6a9bf3791f4e49abcfe1347451d9921d83f0347dde4a327c9136fa9b59566949"}},'
        b'"digest":"49ec6a67620581ac1ef07f746cfb451745490301e8e4d4f2e37f3e284f7bcb37"}',
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    state = load(tmp_path, "run")
    assert same(state, {"iteration": 7, "x": {"w": torch.tensor([1, 2]).short(), "n": {0: (float("inf"),)}}})
    path = save(tmp_path / "now", state, 1, "run")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files


# Damage


def damages(whole: bytes) -> Iterator[bytes]:
    """The file cut at every length, with something added, and with a bit of every byte flipped."""
    yield whole + b"\n"
    for size in range(len(whole)):
        yield whole[:size]
    for at in range(len(whole)):
        yield whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_seen_and_named_and_the_older_checkpoint_taken(tmp_path: Path, name: str) -> None:
    older, newer = saved(tmp_path, 1, 2)
    for damage in damages((newer / name).read_bytes()):
        (newer / name).write_bytes(damage)
        state, path, damaged = load_newest(tmp_path, "run")
        assert path == older and state["iteration"] == 1
        assert [bad for bad, _ in damaged] == [newer] and f"{newer / name}: damaged" in damaged[0][1]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_is_none_is_named(tmp_path: Path, name: str) -> None:
    (path,) = saved(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(path)
    (path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: Is a directory"):
        load(path)


def test_without_an_intact_checkpoint_the_file_of_each_is_named(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1, 2)
    (first / "state.json").unlink()
    (second / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        load_newest(tmp_path)
    assert f"{first / 'state.json'}: missing" in str(error.value)
    assert f"{second / 'model.safetensors'}: damaged" in str(error.value)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_no_checkpoint_is_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_newest(tmp_path / "checkpoints")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    shutil.copytree(save(tmp_path / "b", state_of(2), 1, "other"), tmp_path / "a" / "iteration-000002")
    state, _, damaged = load_newest(tmp_path / "a", "run")
    assert state["iteration"] == 1 and "of another run" in damaged[0][1]
    assert load_newest(tmp_path / "a").state["iteration"] == 2


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    first, second = saved(tmp_path, 1, 2)
    shutil.copy(first / name, second / name)
    with pytest.raises(CheckpointError, match=name):
        load(second)


def test_a_checkpoint_under_another_iteration_is_refused_but_may_be_kept_under_a_name(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    renamed = path.rename(tmp_path / "iteration-000002")
    with pytest.raises(CheckpointError, match="iteration 1"):
        load(renamed)
    assert load(renamed.rename(tmp_path / "best"))["iteration"] == 1


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    _, path = saved(tmp_path, 1, 2)
    resign(path, format=checkpoint.FORMAT + 1, files="in a way of its own")
    with pytest.raises(CheckpointError, match=r"manifest.json: format 2.*upgrade polopt"):
        load(path)
    state, _, damaged = load_newest(tmp_path)
    assert state["iteration"] == 1 and "upgrade polopt" in damaged[0][1]


SECRET = {"bytes": 6, "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": []},
        {"files": None},
        {"files": {"state.json": SECRET, "../secret": SECRET}},
        {"files": {"state.json": SECRET, "/etc/passwd": SECRET}},
        {"files": {"state.json": SECRET, "../secret.safetensors": SECRET}},
        {"files": {"state.json": SECRET, "state.json\n": SECRET}},
        {"iteration": None},
        {"format": "1", "files": None},
    ],
    ids=str,
)
def test_a_manifest_that_polopt_would_not_write_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (path,) = saved(tmp_path, 1)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret.safetensors").write_text("secret")
    resign(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not written by polopt|of iteration None"):
        load(path)


@pytest.mark.parametrize("entry", [None, {}, {"bytes": 6}, SECRET | {"more": 1}], ids=str)
def test_an_entry_that_polopt_would_not_write_is_refused(tmp_path: Path, entry: Any) -> None:
    (path,) = saved(tmp_path, 1)
    (path / "state.json").write_text("secret")
    resign(path, files={"state.json": entry})
    with pytest.raises(CheckpointError, match=r"state\.json: damaged"):
        load(path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"3", b'{"digest":1}', b"[" * 100_000, b"\xff\xfe", b"{}"]
)
def test_a_manifest_that_is_something_else_is_refused(tmp_path: Path, text: bytes) -> None:
    (path,) = saved(tmp_path, 1)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        load(path)


@pytest.mark.parametrize("tree", [[], {"x": {"$tensor": "w"}}, {"x": {"$float": {}}}], ids=str)
def test_a_well_signed_checkpoint_of_nonsense_is_refused(tmp_path: Path, tree: Any) -> None:
    (path,) = saved(tmp_path, 1)
    resign(
        path, files={"state.json": checkpoint.write_file(path / "state.json", [json.dumps(tree).encode()])}
    )
    with pytest.raises(CheckpointError, match="not written by polopt"):
        load(path)


# Crashes


class Crash(BaseException):
    """The process ends here."""


class Disk:
    """The system calls of a save, counted; the `fail_at`-th fails, a write when half of it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_at, self.error, self.calls = 0, BaseException(), list[tuple[str, Any]]()
        monkeypatch.setattr(checkpoint, "os", self)
        monkeypatch.setattr(checkpoint, "shutil", self)
        monkeypatch.setattr(checkpoint, "open", self.open_file, raising=False)

    def arm(self, fail_at: int = 0, error: BaseException | None = None) -> None:
        self.fail_at, self.error, self.calls = fail_at, error or Crash(), []

    def call(self, name: str, target: Any) -> None:
        self.calls.append((name, target))
        if len(self.calls) == self.fail_at:
            raise self.error

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mkdir(self, path: Path) -> None:
        self.call("mkdir", path)
        os.mkdir(path)

    def rename(self, old: Path, new: Path) -> None:
        self.call("rename", (Path(old), Path(new)))
        os.rename(old, new)

    def fsync(self, descriptor: int) -> None:
        self.call("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def rmtree(self, path: Path, ignore_errors: bool = False) -> None:
        for file in path.iterdir() if path.exists() else []:
            self.call("unlink", file)
            file.unlink()
        if path.exists():
            self.call("rmdir", path)
            path.rmdir()

    def open_file(self, path: Path, mode: str) -> Any:
        self.call("open", path)
        return open(path, mode) if mode == "rb" else CountedFile(self, path)


class CountedFile:
    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk, self.file = disk, open(path, "wb", buffering=0)  # noqa: SIM115

    def write(self, chunk: bytes | memoryview) -> None:
        try:
            self.disk.call("write", Path(self.file.name))
        except BaseException:
            self.file.write(chunk[: len(chunk) // 2])
            raise
        self.file.write(chunk)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def damage_of(path: Path) -> None:
    (path / "state.json").write_bytes(b"")


# name: (iterations saved before, those damaged since, iteration saved now, keep)
SITUATIONS = {
    "first": ([], [], 1, 1),
    "next, one kept": ([1], [], 2, 1),
    "next, two kept": ([1, 2, 3], [], 4, 2),
    "again": ([5], [], 5, 1),
    "again, damaged": ([4, 5], [5], 5, 1),
    "after a return": ([10, 20, 30], [20, 30], 15, 1),
}


def prepared(disk: Disk, folder: Path, situation: str) -> tuple[Callable[[], Path], list[int]]:
    """Brings a folder into a situation; returns the save to come and the iterations that are intact."""
    before, damaged, now, keep = SITUATIONS[situation]
    disk.arm()
    for iteration in before:
        path = save(folder, state_of(iteration, "old"), len(before), "run")
        if iteration in damaged:
            damage_of(path)
    return lambda: save(folder, state_of(now, "new"), keep, "run"), [i for i in before if i not in damaged]


def calls_of(disk: Disk, folder: Path, situation: str) -> list[tuple[str, Any]]:
    run, _ = prepared(disk, folder, situation)
    disk.arm()
    run()
    return disk.calls


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new(
    disk: Disk, tmp_path: Path, situation: str
) -> None:
    calls = calls_of(disk, tmp_path / "whole", situation)
    published = max(
        at for at, (name, what) in enumerate(calls, 1) if name == "rename" and is_temporary(what[0])
    )
    assert len(calls) >= 18 and 1 < published < len(calls)
    for at in range(1, len(calls) + 1):
        folder = tmp_path / str(at)
        run, intact = prepared(disk, folder, situation)
        disk.arm(at)
        with pytest.raises(Crash):
            run()
        disk.arm()
        old = "old" if intact else "none"
        assert outcome(folder, intact, situation) == (old if at <= published else "new")
        path = run()
        assert load_newest(folder, "run").state["method"]["mark"] == "new"
        assert not list(folder.glob(".*"))
        assert checkpoints(folder)[-1] == path and len(checkpoints(folder)) <= SITUATIONS[situation][3]


def test_saves_that_are_killed_twice_leave_the_old_or_the_new(disk: Disk, tmp_path: Path) -> None:
    calls = calls_of(disk, tmp_path / "whole", "again")
    renamed = min(at for at, (name, _) in enumerate(calls, 1) if name == "rename")
    for first, second in product(range(renamed + 1, len(calls) + 1), range(1, len(calls) + 1)):
        folder = tmp_path / f"{first} {second}"
        run, intact = prepared(disk, folder, "again")
        for at in (first, second):
            disk.arm(at)
            with pytest.raises(Crash):
                run()
        disk.arm()
        outcome(folder, intact, "again")


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".")


def outcome(folder: Path, intact: list[int], situation: str) -> str:
    """Which checkpoint a crash has left as the newest, checked against what it must be; none may be half of one."""
    _, damaged, now, _ = SITUATIONS[situation]
    for path in checkpoints(folder):
        assert (path / "manifest.json").exists() and (damaged or load(path))
    if not intact and not checkpoints(folder):
        return "none"
    state = load_newest(folder, "run").state
    mark = state["method"]["mark"]
    assert same(state, state_of(now if mark == "new" else intact[-1], mark))
    return mark


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_disk_that_fails_anywhere_costs_nothing_older(
    disk: Disk, tmp_path: Path, situation: str, code: int
) -> None:
    for at, call in enumerate(calls_of(disk, tmp_path / "whole", situation), 1):
        folder = tmp_path / str(at)
        run, intact = prepared(disk, folder, situation)
        disk.arm(at, OSError(code, os.strerror(code)))
        with pytest.raises(CheckpointError, match=f"iteration-.*{os.strerror(code)}"):
            run()
        disk.arm()
        published = (folder / f"iteration-{SITUATIONS[situation][2]:06d}" / "manifest.json").exists()
        if intact or published:
            assert load_newest(folder, "run").state["method"]["mark"] in ("old", "new"), call
        if call[0] in ("open", "write", "fsync") and not published:
            assert not list(folder.glob(".*")), "the half-written one gives its space back"
        run()
        assert load_newest(folder, "run").state["method"]["mark"] == "new"


def test_everything_is_on_the_disk_before_it_is_relied_upon(disk: Disk, tmp_path: Path) -> None:
    calls = calls_of(disk, tmp_path / "c", "next, one kept")
    temporary, target = tmp_path / "c/.iteration-000002.tmp", tmp_path / "c/iteration-000002"
    where = {call: at for at, call in reversed(list(enumerate(calls)))}
    published = where["rename", (temporary, target)]
    manifest = where["open", temporary / "manifest.json"]
    for name in FILES:
        synced = where["fsync", temporary / name]
        last_write = max(at for at, call in enumerate(calls) if call == ("write", temporary / name))
        assert last_write < synced < published
        assert name == "manifest.json" or synced < manifest
    assert where["fsync", temporary / "manifest.json"] < where["fsync", temporary] < published
    removals = [at for at, (name, _) in enumerate(calls) if name in ("unlink", "rmdir")]
    assert published < where["fsync", tmp_path / "c"] < where["fsync", tmp_path] < min(removals)


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from polopt.engine.checkpoint import load_newest, save

def state(iteration):
    return {"iteration": iteration, "model": {str(i): torch.full((5000,), float(iteration)) for i in range(4)}}

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
save(folder, state(0), 1, "run")
found = [0]
for number in range(rounds):
    child = os.fork()
    if child == 0:
        while True:
            found[-1] += 1
            save(folder, state(found[-1]), 1, "run")
    time.sleep(0.002 * (number % 15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded, path, damaged = load_newest(folder, "run")
    assert not damaged, damaged
    assert all((t == loaded["iteration"]).all() for t in loaded["model"].values())
    assert loaded["iteration"] >= found[-1]
    found.append(loaded["iteration"])
print("killed", rounds)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_processes_that_are_killed_leave_an_intact_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c"), "30"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "killed 30\n", ended.stderr
