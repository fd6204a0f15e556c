"""Everything public says what it is; an overriding method may leave that to the class it comes from."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = sorted(".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py"))


def undocumented(owner: Any, module: str) -> Iterator[str]:
    """Names of public classes, functions and methods defined in `module` that have no docstring."""
    for name, value in vars(owner).items():
        function = inspect.unwrap(value) if callable(value) else value
        if name.startswith("_") or getattr(function, "__module__", None) != module:
            continue
        if inspect.isclass(value) or inspect.isfunction(function):
            if not inspect.getdoc(getattr(owner, name)):
                yield f"{owner.__name__}.{name}"
            if inspect.isclass(value) and value is not owner:
                yield from undocumented(value, module)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert module.__doc__
    assert not list(undocumented(module, module.__name__))
