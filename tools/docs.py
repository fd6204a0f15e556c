"""The documentation's own build steps: reference pages from the package, equations as MathML.

Equations need neither scripts nor fonts from elsewhere: LaTeX between `$` or `$$`, and the `.. math::` blocks of
docstrings, become MathML when the page is built.
"""

import html
import re
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parents[1] / "src"
DIRECTIVE = re.compile(r"^( *)\.\. math::[ \t]*\n((?:\1[ \t]+\S.*\n?|[ \t]*\n(?=\1[ \t]+\S))+)", re.MULTILINE)
ROLE = re.compile(r":math:`([^`]+)`")
ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def pages() -> list[Path]:
    """Pages of the public modules, relative to `docs/`; a package's own is its index."""
    paths = sorted((SOURCE / "polopt").rglob("*.py"))
    paths = [path.with_name("index.py") if path.stem == "__init__" else path for path in paths]
    paths = [path.relative_to(SOURCE / "polopt") for path in paths if not path.stem.startswith("_")]
    return [Path("reference") / path.with_suffix(".md") for path in paths if path != Path("index.py")]


def module(page: Path) -> str:
    """Full name of the module that a page is about."""
    return ".".join(["polopt", *page.with_suffix("").parts[1:]]).removesuffix(".index")


def navigation(paths: list[Path], depth: int = 1) -> list[Any]:
    """The pages as nested sections, one for each package."""
    entries: dict[str, Any] = {}
    for name, group in groupby(paths, key=lambda path: path.parts[depth]):
        inside = list(group)
        is_package = len(inside[0].parts) > depth + 1
        entries[Path(name).stem] = navigation(inside, depth + 1) if is_package else str(inside[0])
    index = [entries.pop("index")] if "index" in entries else []
    return index + [{name: entry} for name, entry in entries.items()]


def on_config(config: MkDocsConfig) -> None:
    """Append the reference to the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": navigation(pages())})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the reference pages, and the texts that lie outside `docs/`."""
    for page in pages():
        files.append(File.generated(config, str(page), content=f"::: {module(page)}\n"))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        files.append(File.generated(config, f"{name.lower()}.md", abs_src_path=f"{name}.md"))


def on_page_content(content: str, **_: Any) -> str:
    """Replace LaTeX by MathML."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        latex = html.unescape(match[2]).strip().replace(r"\tag", r"\qquad\tag")
        return convert(latex, display=display)

    return ARITHMATEX.sub(mathml, content)


class Equations(Extension):
    """Turns the equations of docstrings into markdown's."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring:
            obj.docstring.value = equations_in_markdown(obj.docstring.value)


def equations_in_markdown(text: str) -> str:
    """`.. math::` blocks as `$$` blocks, :math: roles between `$`."""
    return ROLE.sub(lambda role: f"${' '.join(role[1].split())}$", DIRECTIVE.sub(_dollars, text))


def _dollars(match: re.Match[str]) -> str:
    indent, body = match[1], textwrap.dedent(match[2]).strip()
    return textwrap.indent(f"\n$$\n{body}\n$$\n", indent)
