"""A state comes back from its files as it was, bit for bit; nothing else is taken for one."""

import json
import math
import struct
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.engine.serialization import DTYPES, MALFORMED, from_files, to_files
from polopt.errors import CheckpointError


def written(state: dict[str, Any]) -> dict[str, bytearray]:
    return {name: bytearray(b"".join(chunks)) for name, chunks in to_files(state).items()}


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    return from_files(written(state))


def bits(tensor: Tensor) -> bytes:
    plain = torch.zeros(tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        plain.copy_(tensor)
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return all(map(same, a, b)) and len(a) == len(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    return a == b


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        content = bytes(byte % 2 for byte in content)
    return torch.tensor(list(content), dtype=torch.uint8).view(dtype).view(shape)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
keys = (
    st.text(max_size=4)
    | st.integers()
    | st.sampled_from(["$tensor", "$tuple", "$float", "$items", "1", "a.b", "a"])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.from_regex(r"\A[A-Za-z0-9_-]{1,6}\Z"), values, max_size=3))
@settings(max_examples=100)
def test_any_state_comes_back_as_it_was(state: dict[str, Any]) -> None:
    assert same(round_trip(state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (3, 2)])
def test_every_type_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    content = torch.arange(math.prod(shape) * torch.empty((), dtype=dtype).element_size(), dtype=torch.uint8)
    tensor = (content % 2 if dtype is torch.bool else content).view(dtype).view(shape)
    assert same(round_trip({"x": tensor}), {"x": tensor})


def test_tied_strided_expanded_and_lazy_tensors_come_back() -> None:
    base = torch.arange(12.0).view(3, 4)
    lazy = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    parameter = torch.nn.Parameter(base.clone())
    state = {
        "model": {
            "tied": base,
            "also": base,
            "t": base.t(),
            "step": base[:, ::2],
            "one": base[1:2, 1::4],
            "wide": base[:1].expand(5, 4),
        },
        "lazy": [lazy, lazy.imag, lazy[:1].imag],
        "parameter": parameter,
    }
    loaded = round_trip(state)
    assert same(loaded, state)
    assert type(loaded["parameter"]) is Tensor and not loaded["parameter"].requires_grad
    assert loaded["model"]["tied"].data_ptr() != loaded["model"]["also"].data_ptr()


def test_training_continues_bit_for_bit_from_model_and_optimizer() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.arange(6.0).view(2, 3) * step).pow(2).sum().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, range(5))
    state = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert set(state["optimizer"]["state"]) == {0, 1, 2, 3}
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    other, other_optimizer = make()
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(5, 9))
    train(other, other_optimizer, range(5, 9))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


def test_names_that_would_meet_in_a_file_stay_apart() -> None:
    one, two, three = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    state = {
        "a": {"b": {"c": one}, "b.c": two, "b.c_": three},
        "keys": {1: one, "1": two},
        "reserved": {"__metadata__": one},
    }
    assert same(round_trip(state), state)


def test_subclasses_come_back_plain() -> None:
    loaded = round_trip({"a": OrderedDict(x=np.float64(0.5)), "b": np.str_("y")})
    assert same(loaded, {"a": {"x": 0.5}, "b": "y"})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"b": [object()]}, "state a.b.0: a object"),
        ({"b": {1, 2}}, "state a.b: a set"),
        ({(1, 2): 3}, "state a: a dict"),
        ({True: 3}, "state a: a dict"),
        (np.int64(3), "state a: a int64"),
        (b"bytes", "state a: a bytes"),
        ({"b": torch.zeros(2, dtype=torch.complex128)}, "state a.b: a torch.complex128"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
    ids=[
        "object",
        "set",
        "tuple key",
        "bool key",
        "numpy number",
        "bytes",
        "complex tensor",
        "sparse tensor",
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        to_files({"a": value})


@pytest.mark.parametrize("key", ["", "a/b", "../a", "a.b", "ä", "a\n", 1], ids=repr)
def test_outermost_keys_must_be_names_of_files(key: Any) -> None:
    with pytest.raises(CheckpointError, match="state key"):
        to_files({key: 1})


def test_files_are_safetensors_and_safetensors_are_read() -> None:
    library = pytest.importorskip("safetensors.torch")
    assert list(library.load(bytes(written({"x": {"__metadata__": torch.ones(1)}})["x.safetensors"]))) == [
        "__metadata___"
    ]
    state = {"x": {f"{i} {dtype}": torch.ones(i, 2).to(dtype) for i in range(3) for dtype in DTYPES}}
    files = written(state)
    assert same(
        dict(sorted(library.load(bytes(files["x.safetensors"])).items())), dict(sorted(state["x"].items()))
    )
    files["x.safetensors"] = bytearray(library.save(state["x"], metadata=None))
    assert same(from_files(files), state)


def test_tensors_are_written_from_where_they_are_and_read_into_aligned_memory() -> None:
    state = {"x": {"byte": torch.ones(1, dtype=torch.int8), **{f"{i}": torch.ones(i + 1) for i in range(9)}}}
    chunks = list(to_files(state)["x.safetensors"])[1:]
    addresses = {np.frombuffer(chunk, np.uint8).ctypes.data for chunk in chunks}
    assert addresses == {tensor.data_ptr() for tensor in state["x"].values()}
    loaded = round_trip(state)["x"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())
    ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in loaded.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))


def test_tensors_are_aligned_in_their_file() -> None:
    file = written({"x": {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES}})["x.safetensors"]
    length = int.from_bytes(file[:8], "little")
    for name, entry in json.loads(file[8 : 8 + length]).items():
        size = torch.empty((), dtype=getattr(torch, name.removeprefix("torch."))).element_size()
        assert (8 + length + entry["data_offsets"][0]) % size == 0


def header(value: Any, data: bytes = b"") -> bytearray:
    text = json.dumps(value).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("tree", "tensors"),
    [
        ({"x": {"$tensor": "w"}}, {}),
        ({"x": {"$tensor": ["w"]}}, {}),
        ({"x": {"$float": "one"}}, {}),
        ({"x": {"$items": [[[], 1]]}}, {}),
        ({"x": {"$items": 3}}, {}),
        ({"x": {"$tuple": None}}, {}),
        ([1], {}),
        ("x", {}),
        ({}, {"x": bytearray()}),
        ({}, {"x": bytearray(b"\xff" * 8)}),
        ({}, {"x": header([])}),
        ({}, {"x": header({"w": {}})}),
        ({}, {"x": header({"w": FLOAT})}),
        ({}, {"x": header({"w": FLOAT | {"dtype": "EVIL"}}, b"1234")}),
        ({}, {"x": header({"w": FLOAT | {"shape": [2]}}, b"1234")}),
        ({}, {"x": header({"w": FLOAT | {"shape": [2**63]}}, b"1234")}),
        ({}, {"x": header({"w": FLOAT | {"shape": [-3]}}, b"1234")}),
        ({}, {"x": header({"w": FLOAT | {"data_offsets": [0, 10**30]}}, b"123")}),
        ({}, {"x": header({"w": FLOAT | {"data_offsets": ["0", None]}}, b"1234")}),
        ({}, {"x": header({"w": FLOAT | {"data_offsets": [1, 3]}}, b"1234")}),
    ],
    ids=str,
)
def test_files_of_no_state_are_malformed(tree: Any, tensors: dict[str, bytearray]) -> None:
    files = {f"{key}.safetensors": content for key, content in tensors.items()}
    with pytest.raises(MALFORMED):
        from_files({**files, "state.json": bytearray(json.dumps(tree).encode())})


def test_deep_nesting_is_malformed() -> None:
    with pytest.raises(MALFORMED):
        from_files({"state.json": bytearray(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")})


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_noise_is_malformed(text: bytes, content: bytes) -> None:
    with pytest.raises(MALFORMED):
        from_files({"state.json": bytearray(b"\x00" + text), "x.safetensors": bytearray(content)})
    with pytest.raises(MALFORMED):
        from_files({"state.json": bytearray(b"{}"), "x.safetensors": bytearray(b"\x40" + bytes(7) + content)})
