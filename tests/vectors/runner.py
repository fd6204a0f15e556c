"""Loads cases, finds their adapters and compares every expected output. README.md says what an adapter is."""

import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ADAPTERS = Path(__file__).parent / "adapters"
Adapter = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def load_cases(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Slug and content of every case of a folder's files.

    Raises:
        FileNotFoundError: the folder has none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.json files")
    loaded = [json.loads(file.read_text()) for file in files]
    return [(content["slug"], case) for content in loaded for case in content["cases"]]


def missing(slug: str, case: dict[str, Any]) -> str:
    """What has no adapter."""
    if (ADAPTERS / f"{slug}.py").exists():
        return f"no adapter for operation {operation_of(case)!r} of slug {slug}"
    return f"no adapter for slug {slug}"


def operation_of(case: dict[str, Any]) -> str | None:
    """The name of a case's operation, None if it names none."""
    inputs, params = case.get("inputs", {}), case.get("params", {})
    named = [case.get("fn"), case.get("function"), params.get("operation"), params.get("op")]
    named += [inputs.get("kind"), inputs.get("op"), inputs.get("operation"), params.get("kind")]
    return next((name for name in named if isinstance(name, str)), None)


def find_adapter(slug: str, case: dict[str, Any]) -> Adapter | None:
    """The adapter of a case, None if there is none."""
    file = ADAPTERS / f"{slug}.py"
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"vector_adapter_{slug.replace('-', '_')}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    operations: dict[str | None, Adapter] = module.OPERATIONS
    if None in operations:
        return operations[None]
    operation = operation_of(case) or ""
    fitting = [name for name in operations if name and operation.startswith(name)]
    return operations[max(fitting, key=len)] if fitting else None


def as_input(value: Any) -> Any:
    """A tensor of numbers; anything else as it is."""
    if not isinstance(value, list | int | float) or isinstance(value, bool) or not is_rectangular(value):
        return value
    tensor = torch.tensor(nan_for_null(value))
    return torch.tensor(nan_for_null(value), dtype=torch.float64) if tensor.is_floating_point() else tensor


def nan_for_null(value: Any) -> Any:
    """Nested lists with NaN in place of null."""
    if isinstance(value, list):
        return [nan_for_null(entry) for entry in value]
    return math.nan if value is None else value


def is_rectangular(value: Any) -> bool:
    """Whether it is a number or a nested list of numbers and nulls that a tensor can hold."""
    try:
        torch.tensor(nan_for_null(value))
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def differences(case: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is wrong with an adapter's outputs, one line each."""
    wrong: list[str] = []
    for name, expected in case["expected"].items():
        if name in found:
            wrong += mismatches(name, found[name], expected, case["rtol"], case["atol"])
        else:
            wrong.append(f"{name}: not computed")
    return wrong


def mismatches(name: str, found: Any, expected: Any, rtol: float, atol: float) -> list[str]:
    """What is wrong with an output: numbers up to the tolerances, texts and null exactly, nested values one by one."""
    if expected is None or isinstance(expected, str):
        return [] if found == expected else [f"{name}: {found!r}, expected {expected!r}"]
    if isinstance(expected, dict):
        missing = [f"{name}.{key}: not computed" for key in expected if key not in found]
        present = (
            mismatches(f"{name}.{key}", found[key], expected[key], rtol, atol)
            for key in expected
            if key in found
        )
        return [*missing, *itertools.chain.from_iterable(present)]
    if not is_rectangular(expected):
        if len(found) != len(expected):
            return [f"{name}: {len(found)} entries, expected {len(expected)}"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (f, e) in pairs for line in mismatches(f"{name}[{i}]", f, e, rtol, atol)]
    actual, wanted = (
        torch.as_tensor(found).double(),
        torch.tensor(nan_for_null(expected), dtype=torch.float64),
    )
    if actual.shape != wanted.shape:
        return [f"{name}: shape {tuple(actual.shape)}, expected {tuple(wanted.shape)}"]
    if torch.allclose(actual, wanted, rtol=rtol, atol=atol, equal_nan=True):
        return []
    return [f"{name}: {actual.tolist()}, expected {expected}"]


def run_case(adapter: Adapter, case: dict[str, Any]) -> list[str]:
    """Run one case; what is wrong with it, one line each."""
    inputs = {name: as_input(value) for name, value in case["inputs"].items()}
    return differences(case, adapter(inputs, case.get("params", {})))
