"""Every method has a page that says what it is, how to run it and when to use it."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from polopt.parts import SLOTS
from polopt.registry import recipe, recipes

TOOLS = Path(__file__).parents[1] / "tools"
pytest.importorskip("mkdocs")


def load() -> ModuleType:
    """The build step that makes the pages."""
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("method_pages", TOOLS / "method_pages.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


PAGES = load()
FOUND: dict[str, str] = PAGES.pages()


def page_of(name: str) -> str:
    return FOUND[PAGES.path_of(recipes()[name].__module__)]


@pytest.mark.parametrize("name", recipes())
def test_recipe_has_a_page_with_its_command(name: str) -> None:
    page = page_of(name)
    assert f"--method {name}" in page or f'polopt.recipe("{name}")' in page
    assert page.startswith("# ") and f"Recipe `{name}`" in page


@pytest.mark.parametrize("name", recipes())
def test_page_has_the_equations_of_the_docstring(name: str) -> None:
    docstring = sys.modules[recipes()[name].__module__].__doc__ or ""
    assert page_of(name).count("$$") == 2 * docstring.count(".. math::") > 0
    assert ".. math::" not in page_of(name) and ":math:" not in page_of(name)


@pytest.mark.parametrize("name", recipes())
def test_page_has_every_option_of_every_part(name: str) -> None:
    page = page_of(name)
    for part in recipe(name).parts:
        if part.name == "default":
            continue
        section = page.split(f"### {part.slot} `{part.name}`")[1].split("###")[0]
        for option, field in type(part).Config.model_fields.items():
            (row,) = re.findall(rf"^\| `{option}` .*$", section, re.MULTILINE)
            assert " ".join((field.description or "").split())[:30].replace("|", r"\|") in row


@pytest.mark.parametrize("name", recipes())
def test_page_says_when_to_use_the_method_and_what_goes_wrong(name: str) -> None:
    page = page_of(name)
    for heading in ("## When to use it\n\nUse it ", "## Pitfalls\n\n"):
        assert heading in page
    used = page.split("## When to use it")[1].split("##")[0]
    assert re.search(r"\b[Nn]ot\b", used)


@pytest.mark.parametrize("name", recipes())
def test_page_shows_which_part_fills_each_slot(name: str) -> None:
    table = re.split("## |Recipe `|On the domain", page_of(name).split(f"Recipe `{name}`")[1])[0]
    for slot in SLOTS:
        (row,) = re.findall(rf"^\| {slot} \| .*$", table, re.MULTILINE)
        for part in recipe(name).slot(slot):
            assert f"[`{part.name}" in row


def test_what_is_reconstructed_is_said_on_the_page_and_in_the_table() -> None:
    for module, (_, own) in PAGES.methods().items():
        path = PAGES.path_of(module)
        notes = [part.reconstructed for part in own if part.reconstructed]
        assert ('!!! warning "Reconstructed"' in FOUND[path]) == bool(notes), module
        (row,) = [line for line in FOUND["methods/index.md"].splitlines() if f"]({path[8:]})" in line]
        assert row.endswith("| no |") == (not notes)


def test_names_that_clash_are_told_apart() -> None:
    assert 'loss_type="bnpo"' in page_of("bnpo").split("## Not to be confused")[1].split("##")[0]
    assert "Dynamic Clipping" in page_of("dcpo").split("## Not to be confused")[1].split("##")[0]


def test_index_lists_every_recipe_with_its_paper() -> None:
    index = FOUND["methods/index.md"]
    for name in recipes():
        assert re.search(rf"\[[^\]]*\b{re.escape(name)}\b[^\]]*\]\(", index), name
    assert "https://arxiv.org/abs/2402.03300" in index
