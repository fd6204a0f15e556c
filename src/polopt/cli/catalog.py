"""Names of the library's recipes and parts, read from its source files.

Importing the methods imports torch, which takes seconds; a misspelt name is refused without that.
"""

import ast
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import polopt
from polopt.config import SLOTS, RunConfig
from polopt.errors import ConfigError
from polopt.settings import nearest

PACKAGE = Path(polopt.__file__).parent


class Catalog(NamedTuple):
    """What is registered under which names."""

    recipes: set[str]
    parts: dict[str, set[str]]
    """By slot."""


def check_names(config: RunConfig) -> None:
    """Refuse names of recipes and parts that nothing can have registered.

    Raises:
        ConfigError: there is no such recipe or part, nor a plugin that could bring it.
    """
    if config.plugins or entry_points(group="polopt.methods"):
        return
    catalog = read_catalog()
    if config.method not in catalog.recipes:
        raise ConfigError(f"method = {config.method!r}: unknown; {nearest(config.method, sorted(catalog.recipes))}")
    for slot, filling in config.slots.items():
        known = sorted(catalog.parts[slot])
        for spec in [filling] if isinstance(filling, str) else filling:
            name = spec.partition(":")[0]
            if name not in (*known, "default"):
                raise ConfigError(f"{slot} = {name!r}: unknown; {nearest(name, known)}")


def read_catalog() -> Catalog:
    """The names that the library itself registers."""
    classes: dict[str, list[ast.ClassDef]] = {}
    catalog = Catalog(set(), {slot: set() for slot in SLOTS})
    for path in [PACKAGE / "method.py", *sorted((PACKAGE / "methods").rglob("*.py"))]:
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
            if isinstance(node, ast.FunctionDef):
                catalog.recipes.update(_names(node, "register_recipe"))
    for nodes in classes.values():
        for node in nodes:
            for slot in _slots(node, classes):
                catalog.parts[slot].update(_names(node, "register"))
    return catalog


def _names(node: ast.ClassDef | ast.FunctionDef, decorator: str) -> set[str]:
    """Names given to the decorators of this kind, `@decorator("name")`."""
    return {
        call.args[0].value
        for call in node.decorator_list
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == decorator
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def _slots(node: ast.ClassDef, classes: dict[str, list[ast.ClassDef]]) -> set[str]:
    """Slots of a part: the nearest `slot = "..."` of it and of all classes that have the name of a base."""
    slots, waiting, seen = set(), [node], []
    while waiting:
        node = waiting.pop()
        seen.append(node)
        declared = [s for s in node.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "slot"]
        slots.update(ast.literal_eval(statement.value) for statement in declared)
        bases = [] if declared else [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        waiting += [base for name in bases for base in classes.get(name, []) if base not in seen]
    return slots
