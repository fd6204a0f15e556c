"""A state as files: its tensors in the safetensors format, everything else as JSON. Nothing is pickled.

The safetensors format is a JSON header followed by raw data. It is written here one tensor at a time, so that a save
holds no second copy of the state in memory and can be hashed on the way; it is read into memory that torch aligned, so
that kernels whose order of summation depends on alignment repeat themselves after a resume.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from polopt.errors import CheckpointError

State = dict[str, Any]

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading files that were not written here can raise."""

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
"""The types of tensors that can be saved, by their names in the safetensors format."""
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


def to_files(state: State) -> dict[str, Iterable[bytes | memoryview]]:
    """Splits a state into files.

    Args:
        state: nested dicts (keys str or int), lists and tuples of tensors, numbers, strings and None. Tied tensors are
            stored once per name. The outermost keys name files: letters, digits, `_` and `-`.

    Returns:
        The chunks of each file, made as they are asked for: `KEY.safetensors` for each outermost key that holds
        tensors, and `state.json`.

    Raises:
        CheckpointError: if the state holds something else; names where.
    """
    tree, files = {}, {}
    for key, value in state.items():
        if not isinstance(key, str) or not re.fullmatch(r"[\w-]+", key, re.ASCII):
            raise CheckpointError(
                f"state key {key!r}: names a file, so it must be of letters, digits, '_' and '-'"
            )
        tensors: dict[str, Tensor] = {}
        tree[key] = _encode(value, (key,), tensors)
        if tensors:
            files[f"{key}.safetensors"] = _serialize(tensors)
    return {**files, "state.json": [dump(tree)]}


def from_files(contents: dict[str, bytearray]) -> State:
    """Puts a state together from its files, which are removed from `contents` one by one to save memory.

    Raises:
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError: if they are not the files
            of a state (`MALFORMED`).
    """
    tree = json.loads(contents.pop("state.json"))
    tensors = {name.removesuffix(".safetensors"): _deserialize(contents.pop(name)) for name in list(contents)}
    return {key: _decode(value, tensors.get(key, {})) for key, value in tree.items()}


def dump(value: Any) -> bytes:
    """Compact JSON, strict and in ASCII."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _encode(value: Any, path: tuple[str | int, ...], tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; its tensors go to `tensors`. What JSON lacks becomes an object whose one key begins with $."""
    match value:
        case Tensor() if value.dtype in DTYPES and value.layout is torch.strided:
            name = ".".join(map(str, path[1:] or path))
            while name in tensors or name == "__metadata__":
                name += "_"
            tensors[name] = value
            return {"$tensor": name}
        case float() if not math.isfinite(value):
            return {"$float": str(float(value))}
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            items = [_encode(item, (*path, i), tensors) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        case dict() if all(type(key) in (str, int) for key in value):
            items = {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return items if plain else {"$items": list(items.items())}
    what = f"{value.dtype}, {value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
    raise CheckpointError(
        f"state {'.'.join(map(str, path))}: a {what} cannot be saved; use dense tensors, numbers, strings, None, and "
        "lists, tuples and dicts (keys str or int) of them"
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


def _serialize(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format: the header's length, the header, the data with the widest types first."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = dump(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        yield plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def _deserialize(content: bytearray) -> dict[str, Tensor]:
    start = 8 + int.from_bytes(content[:8], "little")
    data = torch.frombuffer(content, dtype=torch.uint8)[start:]
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].clone().view(_DTYPE_OF[entry["dtype"]]).view(entry["shape"])
    return tensors
