"""Checkpoints that are complete or absent, and that are checked before they are used.

A checkpoint is a folder:

    iteration-000123/
      model.safetensors, optimizer.safetensors, ...   the tensors of each top-level key of the state
      state.json                                      everything else, and where each tensor belongs
      manifest.json                                   format, iteration, fingerprint; size and SHA-256 of each file

It is written under a temporary name, the manifest last, synced to the disk and then renamed; older checkpoints are
removed only after that. So whenever a save stops, the newest complete checkpoint is still there. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from polopt.engine.serialization import MALFORMED, State, dump, from_files, to_files
from polopt.errors import CheckpointError, ConfigError

FORMAT = 1  # the newest format that is read; how a manifest carries its digest stays the same in all formats
_FOLDER = re.compile(r"iteration-(\d{6,})(?:\.(\d+))?", re.ASCII)
_FILE = re.compile(r"state\.json|[\w-]+\.safetensors", re.ASCII)


class Loaded(NamedTuple):
    """The newest intact checkpoint, and those that had to be passed over for it."""

    state: State
    path: Path
    damaged: list[tuple[Path, str]]


def save(folder: Path, state: State, keep: int, fingerprint: str) -> Path:
    """Writes one checkpoint, then removes those it makes superfluous.

    Checkpoints of this or of later iterations that are already there belong to a course that the run has left (it was
    resumed from an older one); once the new one is complete they are removed too.

    Args:
        folder: the folder of checkpoints; made if missing. One process at a time may write in it.
        state: what `serialization.to_files` takes: nested dicts, lists and tuples of tensors, numbers, strings and
            None. `state["iteration"]` >= 0 names the checkpoint.
        keep: how many checkpoints to keep, this one included, >= 1.
        fingerprint: identifies the run; loading can demand it.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: if `keep` or the iteration is out of range.
        CheckpointError: if the state holds something else, or the disk refuses; older checkpoints are then intact.
    """
    iteration = state.get("iteration")
    if keep < 1 or not isinstance(iteration, int) or iteration < 0:
        raise ConfigError(f"keep = {keep}, state iteration = {iteration}: must be integers, >= 1 and >= 0")
    contents = to_files(state)
    target = folder / f"iteration-{iteration:06d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".iteration-*.tmp"):
            shutil.rmtree(stale)
        os.mkdir(temporary)
        files = {name: write_file(temporary / name, chunks) for name, chunks in contents.items()}
        manifest = {"format": FORMAT, "iteration": iteration, "fingerprint": fingerprint, "files": files}
        write_file(temporary / "manifest.json", [_manifest(manifest)])
        sync_folder(temporary)
        _publish(temporary, target)
        _prune(target, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target}: {error.strerror or error}; older checkpoints are intact") from error
    return target


def load(path: Path, fingerprint: str | None = None) -> State:
    """Reads one checkpoint, after checking every byte of it.

    Args:
        path: the checkpoint's folder.
        fingerprint: if given, what the checkpoint must have been saved with.

    Returns:
        The state as it was saved; tensors on the CPU, subclasses of dict and tensor as plain ones.

    Raises:
        CheckpointError: naming the file that is missing, damaged, of another run or of a newer format.
    """
    files = _read_manifest(path, fingerprint)
    contents = {name: _read_verified(path / name, entry) for name, entry in files.items()}
    try:
        return from_files(contents)
    except MALFORMED as error:
        raise CheckpointError(f"{path}: not written by polopt, {error!r}") from error


def load_newest(folder: Path, fingerprint: str | None = None) -> Loaded:
    """Reads the newest checkpoint that is intact.

    Args:
        folder: the folder of checkpoints.
        fingerprint: if given, what the checkpoint must have been saved with.

    Returns:
        The state, the checkpoint's folder, and each newer checkpoint that was passed over with the reason, which
        names the file; the caller is to warn of them.

    Raises:
        CheckpointError: if none is intact, naming the damaged file of each, or if there is none.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        try:
            return Loaded(load(path, fingerprint), path, damaged)
        except CheckpointError as error:
            damaged.append((path, str(error)))
    if not damaged:
        raise CheckpointError(f"{folder}: holds no checkpoint")
    raise CheckpointError("no intact checkpoint: " + "; ".join(reason for _, reason in damaged))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, by name alone: whether they are intact only `load` can tell."""
    return sorted((path for path in folder.glob("iteration-*") if _FOLDER.fullmatch(path.name)), key=_age)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file and syncs it to the disk; returns its size in bytes and its SHA-256, hashed on the way."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Syncs a folder to the disk, and with it the names of the files in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _age(path: Path) -> tuple[int, float]:
    """Sorts by iteration; `iteration-000123.1` was moved out of the way of a newer `iteration-000123`."""
    match = _FOLDER.fullmatch(path.name)
    assert match
    return int(match[1]), float(match[2] or "inf")


def _publish(temporary: Path, target: Path) -> None:
    if target.exists():
        moved = [
            _age(path)[1] for path in checkpoints(target.parent) if path.stem == target.name != path.name
        ]
        os.rename(target, f"{target}.{int(max(moved, default=0)) + 1}")
    os.rename(temporary, target)
    sync_folder(target.parent)
    sync_folder(target.parent.parent)


def _prune(newest: Path, keep: int) -> None:
    older = [path for path in checkpoints(newest.parent) if _age(path)[0] < _age(newest)[0]]
    kept = {newest, *older[max(len(older) - keep + 1, 0) :]}
    for path in checkpoints(newest.parent):
        if path not in kept:
            doomed = path.with_name(f".{path.name}.tmp")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _manifest(content: dict[str, Any]) -> bytes:
    return dump({**content, "digest": hashlib.sha256(dump(content)).hexdigest()})


def _read_manifest(path: Path, fingerprint: str | None) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint, once its manifest is known to be intact and the one that is asked for."""
    file = path / "manifest.json"
    raw = _read(file)
    try:
        manifest = json.loads(raw)
        del manifest["digest"]
        intact = _manifest(manifest) == raw
    except MALFORMED:
        intact, manifest = False, None
    if not intact:
        raise CheckpointError(f"{file}: damaged, its digest is not that of its content")
    match manifest:
        case {"format": int(version)} if version > FORMAT:
            raise CheckpointError(
                f"{file}: format {version}, polopt here reads up to {FORMAT}; upgrade polopt"
            )
        case {"iteration": iteration, "fingerprint": found, "files": {"state.json": _} as files}:
            named = _FOLDER.fullmatch(path.name)
            if named and int(named[1]) != iteration:
                raise CheckpointError(f"{file}: is of iteration {iteration}, not of its folder's")
            if fingerprint is not None and found != fingerprint:
                raise CheckpointError(
                    f"{file}: of another run or configuration, {found!r} not {fingerprint!r}"
                )
            if all(_FILE.fullmatch(name) for name in files):
                return files
    raise CheckpointError(f"{file}: not written by polopt")


def _read(file: Path) -> bytearray:
    try:
        with open(file, "rb") as stream:
            content = bytearray(os.fstat(stream.fileno()).st_size)
            stream.readinto(content)
            return content
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error


def _read_verified(file: Path, entry: Any) -> bytearray:
    content = _read(file)
    found = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if found != entry:
        raise CheckpointError(f"{file}: damaged, its size or SHA-256 is not the manifest's")
    return content
