"""Checkpoints that are complete or absent, and that are checked before they are used.

A checkpoint is a folder:

    iteration-000123/
      model.safetensors, optimizer.safetensors, ...   the tensors of each top-level key of the state
      state.json                                      everything else, and where each tensor belongs
      manifest.json                                   format, iteration, fingerprint; size and SHA-256 of each file

It is written under a temporary name, the manifest last, synced to the disk and then renamed; older checkpoints are
removed only after that. So whenever a save stops, the newest complete checkpoint is still there. Nothing is pickled.

The safetensors format is a JSON header followed by raw data. It is written here one tensor at a time, hashed on the
way, so that a save holds no second copy of the state in memory; and read into memory that torch aligned, so that the
kernels that use it add up in the same order as before.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polopt.errors import CheckpointError, ConfigError

FORMAT = 1  # the newest format that is read; what `_manifest` computes stays the same in all of them
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
_FOLDER = re.compile(r"iteration-(\d{6,})(?:\.(\d+))?")
_FILE = re.compile(r"state\.json|[\w-]+\.safetensors", re.ASCII)

State = dict[str, Any]


class Loaded(NamedTuple):
    """The newest intact checkpoint, and those that had to be passed over for it."""

    state: State
    path: Path
    damaged: list[tuple[Path, str]]


def save(folder: Path, state: State, *, iteration: int, keep: int, fingerprint: str) -> Path:
    """Writes one checkpoint, then removes the ones it makes superfluous.

    Checkpoints of this or a later iteration that are already there belong to a past that the run has left (it was
    resumed from an older one) and are removed too, once the new one is complete.

    Args:
        folder: the folder of checkpoints; made if missing. One process at a time may write in it.
        state: nested dicts (keys str or int), lists and tuples of tensors, numbers, strings and None. Its own keys
            name files: letters, digits, `_` and `-`. Tied tensors are stored once per name.
        iteration: training iteration, >= 0.
        keep: how many checkpoints to keep, this one included, >= 1.
        fingerprint: identifies the run; loading can demand it.

    Returns:
        The checkpoint's folder, `iteration-000123` (`iteration-000123.1` if that name was taken).

    Raises:
        ConfigError: if `keep` or `iteration` is out of range.
        CheckpointError: if the state holds something else, or the disk refuses; older checkpoints are then intact.
    """
    if keep < 1 or iteration < 0:
        raise ConfigError(f"keep = {keep}, iteration = {iteration}: keep must be >= 1 and iteration >= 0")
    tensors: dict[str, dict[str, Tensor]] = {}
    tree = {key: _encode(value, key, tensors.setdefault(_checked(key), {})) for key, value in state.items()}
    target = _free_name(folder, iteration)
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".iteration-*.tmp"):
            shutil.rmtree(stale)
        os.mkdir(temporary)
        files = {
            f"{key}.safetensors": write_file(temporary / f"{key}.safetensors", _serialise(group))
            for key, group in tensors.items()
            if group
        }
        files["state.json"] = write_file(temporary / "state.json", [_dump(tree)])
        manifest = {"format": FORMAT, "iteration": iteration, "fingerprint": fingerprint, "files": files}
        write_file(temporary / "manifest.json", [_manifest(manifest)])
        sync_folder(temporary)
        os.rename(temporary, target)
        sync_folder(folder)
        sync_folder(folder.parent)
        _prune(folder, target, keep)
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
        The state as it was saved, its tensors on the CPU, dicts and tensors of plain type.

    Raises:
        CheckpointError: naming the file that is missing, damaged, of another run or of a newer format.
    """
    files = _read_manifest(path, fingerprint)
    for name, expected in files.items():
        size = _attempt(path / name, lambda file: file.stat().st_size)
        if size != expected["bytes"]:
            raise CheckpointError(f"{path / name}: damaged, {size} bytes instead of {expected['bytes']}")
    tree: Any = None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, expected in files.items():
        content = _attempt(path / name, _read)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path / name}: damaged, its SHA-256 is not the manifest's")
        if name == "state.json":
            tree = _attempt(path / name, lambda _, content=content: json.loads(content))
        else:
            tensors[name.removesuffix(".safetensors")] = _attempt(
                path / name, lambda _, content=content: _deserialise(content)
            )
    return _attempt(
        path / "state.json",
        lambda _: {key: _decode(value, tensors.get(key, {})) for key, value in tree.items()},
    )


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
    named = [path for path in folder.glob("iteration-*") if _FOLDER.fullmatch(path.name)]
    return sorted(named, key=_order)


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


def _order(path: Path) -> tuple[int, int]:
    match = _FOLDER.fullmatch(path.name)
    assert match
    return int(match[1]), int(match[2] or 0)


def _free_name(folder: Path, iteration: int) -> Path:
    name = f"iteration-{iteration:06d}"
    taken = [_order(path)[1] for path in checkpoints(folder) if _order(path)[0] == iteration]
    return folder / (f"{name}.{max(taken) + 1}" if taken else name)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    older = [path for path in checkpoints(folder) if _order(path)[0] < _order(newest)[0]]
    kept = {newest, *older[len(older) - (keep - 1) :]}
    for path in checkpoints(folder):
        if path not in kept:
            doomed = folder / f".{path.name}.tmp"
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _checked(key: Any) -> str:
    if isinstance(key, str) and _FILE.fullmatch(f"{key}.safetensors"):
        return key
    raise CheckpointError(f"state key {key!r}: must be letters, digits, '_' or '-', since it names a file")


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a state; its tensors go to `tensors`. What JSON lacks becomes an object with one key that begins with $."""
    match value:
        case Tensor():
            if value.dtype not in DTYPES or value.layout is not torch.strided:
                raise CheckpointError(f"state {name}: a tensor of {value.dtype}, {value.layout} cannot be saved")
            while name in tensors or name == "__metadata__":
                name += "_"
            tensors[name] = value
            return {"$tensor": name}
        case float() if not math.isfinite(value):
            return {"$float": str(float(value))}
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            items = [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        case dict() if all(type(key) in (str, int) for key in value):
            items = {key: _encode(item, f"{name}.{key}", tensors) for key, item in value.items()}
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return items if plain else {"$items": list(items.items())}
    raise CheckpointError(
        f"state {name}: a {type(value).__name__} cannot be saved; use tensors, numbers, strings, None, and lists, "
        "tuples and dicts (keys str or int) of them"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$items": items}:
            return {key: _decode(item, tensors) for key, item in items}
        case dict():
            return {key: _decode(item, tensors) for key, item in value.items()}
        case list():
            return [_decode(item, tensors) for item in value]
    return value


def _serialise(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format: length of the header, JSON header, raw data with the widest types first."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = _dump(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        yield plain.view(-1).view(torch.uint8).numpy().data


def _deserialise(content: bytearray) -> dict[str, Tensor]:
    start = 8 + int.from_bytes(content[:8], "little")
    data = torch.frombuffer(content, dtype=torch.uint8)[start:]
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].clone().view(_DTYPE_OF[entry["dtype"]]).view(entry["shape"])
    return tensors


def _dump(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
