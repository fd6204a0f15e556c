"""The runner itself: it can fail."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vectors.runner import find_adapter, load_cases, operation_of, run_case

CASE: dict[str, Any] = {
    "name": "x", "inputs": {"a": [1.0, 2.0], "ragged": [[1], [1, 2]]}, "params": {"k": 2},
    "expected": {"b": [2.0, 4.0]}, "rtol": 1e-6, "atol": 0.0,
}  # fmt: skip


def double(inputs: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    assert inputs["ragged"] == [[1], [1, 2]]
    return {"b": params["k"] * inputs["a"]}


def test_runner_passes_what_agrees_and_names_what_does_not() -> None:
    assert run_case(double, CASE) == []
    assert run_case(lambda i, p: {"b": i["a"]}, CASE)[0].startswith("b:")
    assert run_case(lambda i, p: {"b": torch.zeros(3)}, CASE)[0].startswith("b: shape")
    assert run_case(lambda i, p: {}, CASE) == ["b: not computed"]


def test_runner_finds_operations_wherever_files_name_them() -> None:
    assert operation_of({"fn": "f"}) == "f"
    assert operation_of({"params": {"op": "g"}}) == "g"
    assert operation_of({"params": {"operation": "h"}}) == "h"
    assert operation_of({"inputs": {"kind": "i"}}) == "i"
    assert operation_of({"params": {}, "inputs": {"n": [1]}}) is None


def test_runner_reports_slugs_without_adapter_and_empty_folders(tmp_path: Path) -> None:
    assert find_adapter("no-such-paper", CASE) is None
    with pytest.raises(FileNotFoundError, match="no "):
        load_cases(tmp_path)
