"""The library's recipes and parts, read from its source files.

Importing the methods imports torch, which takes seconds. A misspelt name, an unknown option or a value out of range is
refused without that; what is left for the registry is what a part's own validators and the method as a whole refuse.
"""

import ast
from functools import cache, cached_property, reduce
from importlib.metadata import entry_points
from operator import or_
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, create_model

import polopt
from polopt.config import SLOTS, RunConfig
from polopt.errors import ConfigError
from polopt.settings import Settings, explain, nearest, parse_options

PACKAGE = Path(polopt.__file__).parent
WITH_DEFAULT = ("sampler", "budget", "selection", "optimizer")
"""Slots whose base class is a part of its own, called "default"."""
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
_BOUNDS = ("ge", "gt", "le", "lt")


def check_parts(config: RunConfig) -> None:
    """Refuse recipes, parts and options that nothing can have registered.

    Raises:
        ConfigError: there is no such name or option, or a value is out of range.
    """
    if config.plugins or entry_points(group="polopt.methods"):
        return  # they may bring further ones
    catalog = library()
    if config.method not in catalog.recipes:
        raise ConfigError(
            f"method = {config.method!r}: unknown; {nearest(config.method, sorted(catalog.recipes))}"
        )
    for slot, filling in config.slots.items():
        for spec in [filling] if isinstance(filling, str) else filling:
            name, _, text = spec.partition(":")
            if name not in catalog.parts[slot]:
                raise ConfigError(f"{slot} = {name!r}: unknown; {nearest(name, sorted(catalog.parts[slot]))}")
            settings = catalog.settings(catalog.parts[slot][name])
            try:
                settings.model_validate(parse_options(spec, text))
            except ValidationError as error:
                raise ConfigError(explain(settings, f"{slot} {name}", error.errors()[0])) from None


@cache
def library() -> "Catalog":
    """The catalog of the installed library."""
    return Catalog()


class Catalog:
    """What the library registers, and the settings of the parts as far as their declarations tell."""

    def __init__(self) -> None:
        paths = [
            PACKAGE / "parts.py",
            *(PACKAGE / "functional").glob("*.py"),
            *(PACKAGE / "methods").rglob("*.py"),
        ]
        self._statements = [node for path in sorted(paths) for node in ast.parse(path.read_bytes()).body]

    @cached_property
    def recipes(self) -> set[str]:
        """Names of the recipes."""
        functions = [node for node in self._statements if isinstance(node, ast.FunctionDef)]
        return {name for node in functions for name in _registered(node, "register_recipe")}

    @cached_property
    def parts(self) -> dict[str, dict[str, ast.ClassDef]]:
        """The parts' classes by slot and name."""
        found: dict[str, dict[str, ast.ClassDef]] = {slot: {} for slot in SLOTS}
        for node in self._classes.values():
            slot = self._slot(node) or ""
            for name in _registered(node, "register"):
                found[slot][name] = node
            if slot in WITH_DEFAULT and slot == _own_slot(node):
                found[slot]["default"] = node
        return found

    def settings(self, part: ast.ClassDef) -> type[Settings]:
        """A model that refuses what the part's `Config` does, its validators apart."""
        fields = {}
        for name, declared in self._fields(part).items():
            bounds: dict[str, Any] = {}
            if isinstance(declared.value, ast.Call):
                given = {k.arg: k.value for k in declared.value.keywords}
                bounds = {bound: ast.literal_eval(given[bound]) for bound in _BOUNDS if bound in given}
            fields[name] = (self._type(declared.annotation), Field(None, **bounds))
        return create_model(part.name, __base__=Settings, **fields)

    @cached_property
    def _classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self._statements if isinstance(node, ast.ClassDef)}

    @cached_property
    def _aliases(self) -> dict[str, ast.expr]:
        """Types with a name of their own, `Name = Literal[...]`."""
        assigned = [node for node in self._statements if isinstance(node, ast.Assign)]
        return {
            ast.unparse(node.targets[0]): node.value
            for node in assigned
            if isinstance(node.value, ast.Subscript)
        }

    def _bases(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        return [self._classes[name] for base in node.bases if (name := _last(base)) in self._classes]

    def _slot(self, node: ast.ClassDef) -> str | None:
        return _own_slot(node) or next(filter(None, map(self._slot, self._bases(node))), None)

    def _fields(self, part: ast.ClassDef) -> dict[str, ast.AnnAssign]:
        """Declarations of the fields of a part's `Config`, inherited ones first."""
        own = next((n for n in part.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
        if own is None:
            return reduce(or_, map(self._fields, reversed(self._bases(part))), {})
        inherited: dict[str, ast.AnnAssign] = {}
        for base in own.bases:
            if isinstance(base, ast.Attribute) and _last(base.value) in self._classes:
                inherited |= self._fields(self._classes[_last(base.value)])
            elif isinstance(base, ast.Name) and base.id in self._classes:
                inherited |= _declared(self._classes[base.id])
        return inherited | _declared(own)

    def _type(self, annotation: ast.expr) -> Any:
        """The type of a field; Any where it is not one of the plain ones."""
        match annotation:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in _TYPES:
                return _TYPES[name]
            case ast.Name(id=name) if name in self._aliases:
                return self._type(self._aliases[name])
            case ast.BinOp(left=left, right=right, op=ast.BitOr()):
                one, other = self._type(left), self._type(right)
                return Any if Any in (one, other) else one | other
            case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
                chosen = ast.literal_eval(values)
                return Literal[chosen]
        return Any


def _registered(node: ast.ClassDef | ast.FunctionDef, decorator: str) -> list[str]:
    """Names given to the decorators of this kind, `@decorator("name")`."""
    calls = [
        call for call in node.decorator_list if isinstance(call, ast.Call) and _last(call.func) == decorator
    ]
    return [ast.literal_eval(call.args[0]) for call in calls]


def _declared(settings: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    return {ast.unparse(node.target): node for node in settings.body if isinstance(node, ast.AnnAssign)}


def _own_slot(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "slot":
            return ast.literal_eval(statement.value)
    return None


def _last(name: ast.expr) -> str:
    return ast.unparse(name).rpartition(".")[2]
