"""Everything public says what it is, and the examples run."""

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
    for path in sorted(SOURCE.rglob("*.py"))
    if path.stem != "__main__"
}


def undocumented(owner: Any, module: str) -> Iterator[str]:
    """Public classes, functions and methods of `module` without a docstring; methods inherit theirs."""
    for name, value in vars(owner).items():
        function = inspect.unwrap(value) if callable(value) else value
        if name.startswith("_") or getattr(function, "__module__", None) != module:
            continue
        if inspect.isclass(value) or inspect.isfunction(function):
            if not inspect.getdoc(getattr(owner, name)):
                yield f"{owner.__name__}.{name}"
            if inspect.isclass(value):
                yield from undocumented(value, module)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert not list(undocumented(module, name))


@pytest.mark.parametrize("name", [name for name, source in MODULES.items() if ">>> " in source])
def test_examples_in_docstrings_run(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed
