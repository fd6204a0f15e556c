"""Loads cases, finds their adapters and compares every expected output.

An adapter is a module `adapters/SLUG.py` with `OPERATIONS`, a dictionary from the name of an operation (the case's `fn`,
or `operation`, `op` or `kind` of its parameters or inputs; None where a file has one operation alone) to a function of
(inputs, params) that returns a dictionary with at least the case's expected keys. It calls polopt's public functions and
parts and has no mathematics of its own. Numeric lists among the inputs arrive as tensors, floating ones in float64;
ragged lists, texts and null as they are.
"""

import importlib.util
import json
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


def operation_of(case: dict[str, Any]) -> str | None:
    """The name of a case's operation, None if it names none."""
    named = [case.get("fn")]
    for part in (case.get("params", {}), case.get("inputs", {})):
        named += [part.get(key) for key in ("operation", "op", "kind")]
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
    return operations[None] if None in operations else operations.get(operation_of(case))


def as_input(value: Any) -> Any:
    """A tensor of numbers; anything else as it is."""
    if isinstance(value, bool | str) or value is None or isinstance(value, dict):
        return value
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError):
        return value
    return torch.tensor(value, dtype=torch.float64) if tensor.is_floating_point() else tensor


def differences(case: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is wrong with an adapter's outputs, one line each."""
    wrong: list[str] = []
    for name, expected in case["expected"].items():
        if name not in found:
            wrong.append(f"{name}: not computed")
            continue
        actual = torch.as_tensor(found[name]).double()
        wanted = torch.tensor(expected, dtype=torch.float64)
        if actual.shape != wanted.shape:
            wrong.append(f"{name}: shape {tuple(actual.shape)}, expected {tuple(wanted.shape)}")
        elif not torch.allclose(actual, wanted, rtol=case["rtol"], atol=case["atol"], equal_nan=True):
            wrong.append(f"{name}: {actual.tolist()}, expected {expected}")
    return wrong


def run_case(adapter: Adapter, case: dict[str, Any]) -> list[str]:
    """Run one case; what is wrong with it, one line each."""
    inputs = {name: as_input(value) for name, value in case["inputs"].items()}
    return differences(case, adapter(inputs, case.get("params", {})))
