"""The runner itself: it can fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vectors.runner import as_input, load_cases, operation_of, run_case

ROOT = Path(__file__).parents[2]
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


def test_nested_outputs_are_compared_part_by_part() -> None:
    expected = {"solutions": [{"c": 1.0, "name": "x", "none": None}], "ragged": [[1.0], [2.0, 3.0]]}
    case = CASE | {"inputs": {}, "expected": expected}
    assert run_case(lambda i, p: expected, case) == []
    wrong = {"solutions": [{"c": 1.1, "name": "y"}], "ragged": [torch.ones(1), torch.ones(2)]}
    lines = run_case(lambda i, p: wrong, case)
    assert [line.split(":")[0] for line in lines] == [
        "solutions[0].none", "solutions[0].c", "solutions[0].name", "ragged[1]",
    ]  # fmt: skip
    assert run_case(lambda i, p: wrong | {"solutions": []}, case)[0] == "solutions: 0 entries, expected 1"


def test_numbers_arrive_as_tensors_and_the_rest_as_it_is() -> None:
    assert as_input([1, 2.5]).dtype == torch.float64
    assert as_input([[1, 0], [1, 1]]).dtype == torch.int64
    assert as_input([True]).dtype == torch.bool
    assert as_input([[1.0, None]])[0].isnan().tolist() == [False, True]
    for value in (None, "a", True, ["a", "b"], [[1], [1, 2]], {"a": 1}):
        assert as_input(value) == value


def test_runner_finds_operations_wherever_files_name_them() -> None:
    assert operation_of({"fn": "f"}) == "f"
    assert operation_of({"params": {"op": "g"}}) == "g"
    assert operation_of({"params": {"operation": "h"}}) == "h"
    assert operation_of({"inputs": {"kind": "i"}}) == "i"
    assert operation_of({"function": "loss: of x", "params": {"kind": "no"}}) == "loss: of x"
    assert operation_of({"params": {}, "inputs": {"n": [1]}}) is None


def test_runner_names_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no "):
        load_cases(tmp_path)


def test_folder_of_vectors_passes_fails_and_reports_what_it_cannot_run(tmp_path: Path) -> None:
    good = {
        "name": "good", "fn": "bnpo_advantage_multi", "inputs": {"rewards": [[1.0], [0.0]], "group": [0, 0]},
        "params": {}, "expected": {"advantage": [0.5, -0.5]}, "rtol": 1e-6, "atol": 0.0,
    }  # fmt: skip
    wrong = good | {"name": "wrong", "expected": {"advantage": [0.5, 0.5]}}
    more = good | {"name": "more", "expected": {"advantage": [0.5, -0.5], "loss": 1.0}}
    other = good | {"name": "other", "fn": "unheard_of"}
    files = {"bnpo": [good, wrong, more, other], "no-such-paper": [good, good | {"name": "again"}]}
    for slug, cases in files.items():
        (tmp_path / f"{slug}.json").write_text(json.dumps({"slug": slug, "cases": cases}))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/vectors/test_vectors.py",
        "--vectors",
        str(tmp_path),
        "-q",
        "-rA",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1
    for line in (
        "1 passed", "2 failed", "3 skipped",
        "PASSED tests/vectors/test_vectors.py::test_vector[bnpo-good]",
        "FAILED tests/vectors/test_vectors.py::test_vector[bnpo-wrong]",
        "FAILED tests/vectors/test_vectors.py::test_vector[bnpo-more]",
        "loss: not computed",
        "no adapter for operation 'unheard_of' of slug bnpo (1 cases)",
        "no adapter for slug no-such-paper (2 cases)",
    ):  # fmt: skip
        assert line in done.stdout, done.stdout
