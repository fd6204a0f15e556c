"""Every case of `--vectors DIR` through its adapter. What has no adapter is reported, never passed over."""

from pathlib import Path
from typing import Any, cast

import pytest

from tests.vectors.runner import find_adapter, load_cases, missing, run_case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case."""
    if "case" in metafunc.fixturenames:
        cases = load_cases(cast(Path, metafunc.config.getoption("--vectors")))
        names = [f"{slug}-{case['name']}" for slug, case in cases]
        metafunc.parametrize(("slug", "case"), cases, ids=names)


def test_vector(slug: str, case: dict[str, Any]) -> None:
    adapter = find_adapter(slug, case)
    if adapter is None:
        pytest.skip(missing(slug, case))
    wrong = run_case(adapter, case)
    assert not wrong, "\n".join(wrong)
