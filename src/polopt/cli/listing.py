"""`polopt methods` and `polopt tasks`: what there is to choose from, for people and as JSON."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polopt.cli.catalog import WITH_DEFAULT
from polopt.cli.domains import DOMAINS
from polopt.cli.flags import Parser


def methods(argv: Sequence[str]) -> int:
    """Everything that is registered, by slot."""
    parser = _parser("methods", "Show the recipes, and the parts that fill each slot with their options.")
    found = describe_methods()
    if parser.parse(argv)["json"]:
        return _write(found)
    console = Console()
    console.print(_recipe_table(found["recipes"]))
    for slot, parts in found["slots"].items():
        if parts:
            console.print(_part_table(slot, parts))
    return 0


def tasks(argv: Sequence[str]) -> int:
    """Everything that can be trained on."""
    parser = _parser("tasks", "Show the tasks; --json has their options.")
    as_json = parser.parse(argv)["json"]
    found = {name: domain.tasks() for name, domain in DOMAINS.items()}
    if as_json:
        return _write(found)
    table = Table("Task", "What", title="Tasks", title_justify="left")
    for entries in found.values():
        for entry in entries:
            missing = "" if entry["available"] else " (library not installed)"
            table.add_row(Text(entry["spec"]), Text(entry["summary"] + missing))
    Console().print(table)
    return 0


def describe_methods() -> dict[str, Any]:
    """Recipes and parts as JSON.

    Returns:
        `recipes`: name, title, arxiv, summary, `slots` (names of the parts) and `defaults` (fields of the trainer).
        `slots`: by slot the parts: name, summary, options, requires, provides, domains, reconstructed.
    """
    from polopt.parts import SLOTS
    from polopt.registry import parts, recipes

    bases = {slot: {"default": base} if slot in WITH_DEFAULT else {} for slot, base in SLOTS.items()}
    return {
        "recipes": [_describe_recipe(name, recipe) for name, recipe in recipes().items()],
        "slots": {
            slot: [_describe_part(name, part) for name, part in (bases[slot] | parts(slot)).items()]
            for slot in SLOTS
        },
    }


def _parser(command: str, description: str) -> Parser:
    parser = Parser(command, description, "no argument")
    parser.add_argument("--json", action="store_true", help="write JSON")
    return parser


def _write(found: Any) -> int:
    from polopt.engine.run_folder import strict

    sys.stdout.write(json.dumps(strict(found, "listing"), indent=1, allow_nan=False) + "\n")
    return 0


def _describe_recipe(name: str, recipe: Any) -> dict[str, Any]:
    from polopt.parts import SLOTS

    method = recipe()
    title = (sys.modules[recipe.__module__].__doc__ or name).strip().partition("\n")[0].rstrip(".")
    arxiv = re.search(r"arXiv[ :](\d{4}\.\d{4,5})", title)
    return {
        "name": name,
        "title": title,
        "arxiv": arxiv[1] if arxiv else None,
        "summary": _first_line(recipe),
        "slots": {slot: [part.name for part in method.slot(slot)] for slot in SLOTS},
        "defaults": method.defaults,
    }


def _describe_part(name: str, part: Any) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _first_line(part),
        "options": [_describe_option(option, field) for option, field in part.Config.model_fields.items()],
        "requires": sorted(part.requires),
        "provides": sorted(part.provides),
        "domains": None if part.domains is None else sorted(part.domains),
        "reconstructed": part.reconstructed,
    }


def _describe_option(name: str, field: Any) -> dict[str, Any]:
    kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    default = field.get_default(call_default_factory=True)
    return {
        "name": name,
        "type": kind.replace("typing.", ""),
        "default": default if isinstance(default, str | int | float | None) else str(default),
        "description": " ".join((field.description or "").split()),
    }


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _recipe_table(recipes: list[dict[str, Any]]) -> Table:
    table = Table(
        "Recipe", "Title", "Parts", title="Recipes: --method NAME", title_justify="left", show_lines=True
    )
    for recipe in recipes:
        filled = {slot: [n for n in names if n != "default"] for slot, names in recipe["slots"].items()}
        parts = "\n".join(f"{slot} {', '.join(names)}" for slot, names in filled.items() if names)
        table.add_row(Text(recipe["name"]), Text(recipe["title"]), Text(parts))
    return table


def _part_table(slot: str, parts: list[dict[str, Any]]) -> Table:
    flag = {"regularizers": "regularizer"}.get(slot, slot)
    title = f"Slot {slot}: --{flag} NAME:OPTION=VALUE,OPTION=VALUE"
    table = Table("Part", "What", "Options", title=title, title_justify="left", show_lines=True)
    for part in parts:
        notes = [part["summary"]]
        notes += [f"needs {', '.join(part['requires'])}"] if part["requires"] else []
        notes += [f"reconstructed: {part['reconstructed']}"] if part["reconstructed"] else []
        options = ", ".join(f"{option['name']}={option['default']}" for option in part["options"])
        table.add_row(Text(part["name"]), Text("\n".join(notes)), Text(options))
    return table
