"""A page for each method, from its module's docstring and from what it registers; a table of all.

Nothing of this lies in `docs/`: pages are made when the documentation is built, so that they say what the code does.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs import equations_in_markdown  # pyright: ignore[reportAttributeAccessIssue]
from polopt.cli.domains import DOMAINS
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.parts import MANY, SLOTS, AdvantageTransform, Part
from polopt.registry import parts, recipe, recipe_domains, recipes

PACKAGE = "polopt.methods."
FLAGS = {"regularizers": "regularizer"}
COMPARED = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
RECONSTRUCTED = re.compile(r"(?:^|(?<=[.;)] ))RECONSTRUCTED[:.] ")
CLASH = re.compile(r"Not (?!(?:when|where|with|for|as|in|on|to|if|while|unless)\b)")
SECTIONS = {"Use it": "When to use it", "Pitfalls:": "Pitfalls", "Slots:": "Slots"}


@cache
def methods() -> dict[str, tuple[list[str], list[type[Part]]]]:
    """Recipes and parts of each module that registers any, the classics first."""
    found: dict[str, tuple[list[str], list[type[Part]]]] = {}
    for name, made_by in recipes().items():
        found.setdefault(made_by.__module__, ([], []))[0].append(name)
    for slot in SLOTS:
        for part in parts(slot).values():
            found.setdefault(part.__module__, ([], []))[1].append(part)
    ours = {name: registered for name, registered in found.items() if name.startswith(PACKAGE)}
    return dict(
        sorted(ours.items(), key=lambda item: (not item[0].startswith(f"{PACKAGE}classics."), item[0]))
    )


def forms(name: str) -> list[tuple[str | None, Method]]:
    """The recipe, and its forms for domains that have one of their own."""
    found: list[tuple[str | None, Method]] = [(None, recipe(name))]
    for domain in sorted(set(DOMAINS) & (recipe_domains(name) or set(DOMAINS))):
        form = recipe(name, domain)
        if list(map(repr, form.parts)) != list(map(repr, found[0][1].parts)):
            found.append((domain, form))
    return found


def path_of(module: str) -> str:
    """The page of a module, relative to `docs/`."""
    return f"methods/{module.removeprefix(PACKAGE).replace('.', '/')}.md"


def pages() -> dict[str, str]:
    """Markdown of all pages by their path."""
    return {"methods/index.md": index()} | {path_of(module): page(module) for module in methods()}


def index() -> str:
    """The table of the methods."""
    rows = []
    for module, (names, own) in methods().items():
        title, papers = _title(module)
        slots = {slot for name in names for slot in SLOTS if _filled(recipe(name), slot)}
        slots |= {part.slot for part in own}
        label = ", ".join(names or dict.fromkeys(part.name for part in own))
        link = f"[{label}]({PurePosixPath(path_of(module)).relative_to('methods')})"
        reconstructed = "; ".join(dict.fromkeys(part.reconstructed for part in own if part.reconstructed))
        rows.append(
            [link, title, papers, ", ".join(slot for slot in SLOTS if slot in slots), reconstructed or "no"]
        )
    head = ["Method", "Title", "arXiv", "Slots it fills", "Reconstructed"]
    return "\n\n".join([
        "# Methods",
        "Each method is a recipe, `polopt train --method NAME`, or a part that fills one slot of any recipe. What the "
        "published sources of a method leave open is named in the last column.",
        _table(head, rows),
    ])  # fmt: skip


def page(module: str) -> str:
    """The page of one method."""
    names, own = methods()[module]
    title, papers = _title(module)
    used = {
        (part.slot, part.name): type(part) for name in names for _, form in forms(name) for part in form.parts
    }
    used |= {(part.slot, part.name): part for part in own}
    shown = [part for (_, name), part in used.items() if name != "default"]
    body, sections = _sections(sys.modules[module].__doc__ or "")
    notes = list(dict.fromkeys(part.reconstructed for part in own if part.reconstructed))
    if notes and "Reconstructed" not in sections:
        sections["Reconstructed"] = f"What the published sources do not fix: {'; '.join(notes)}."
    blocks = [f"# {title.partition(' - ')[0]}", title + (f" ({papers})." if papers else ".")]
    blocks += [block for name in names for block in _commands(name)] if names else _part_commands(own)
    if "Reconstructed" in sections:
        blocks.append(f'!!! warning "Reconstructed"\n    {sections["Reconstructed"]}')
    blocks += ["## Idea", *body]
    blocks += [
        f"## {heading}\n\n{sections[heading]}"
        for heading in ("When to use it", "Pitfalls")
        if heading in sections
    ]
    if "Not to be confused" in sections:
        blocks.append(f"## Not to be confused\n\n{sections['Not to be confused']}")
    blocks += ["## Slots", *([sections["Slots"]] if "Slots" in sections else [])]
    blocks += [block for name in names for block in _slots(name)]
    blocks += ["## Options", *(block for part in shown for block in _options(part))]
    blocks += ["## Combining", *_combining(names, own)]
    return "\n\n".join([*blocks, f"Source and functions: [`{module}`][{module}].", ""])


def _title(module: str) -> tuple[str, str]:
    """Name and full title, and links to the papers."""
    first = (sys.modules[module].__doc__ or module).strip().partition("\n")[0].rstrip(".")
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in ARXIV.findall(first)]
    return re.sub(r"\s*\((?:[^()]*?,\s*)?arXiv[^()]*\)", "", first), ", ".join(links)


def _sections(docstring: str) -> tuple[list[str], dict[str, str]]:
    """The docstring's paragraphs in markdown, and those with a place of their own on the page."""
    body: list[str] = []
    sections: dict[str, list[str]] = {}
    text = equations_in_markdown("\n" + docstring.strip().partition("\n")[2].strip() + "\n")
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        if paragraph.startswith((" ", "$$", "- ")):
            body.append(paragraph)
            continue
        line, begins, pitfalls = " ".join(paragraph.split()).partition(" Pitfalls: ")
        if begins:
            sections.setdefault("Pitfalls", []).append(_capital(pitfalls))
        rest, *reconstructed = RECONSTRUCTED.split(line)
        for note in reconstructed:
            sections.setdefault("Reconstructed", []).append(_capital(note))
        line = rest.strip()
        heading = next((heading for start, heading in SECTIONS.items() if line.startswith(start)), None)
        if CLASH.match(line):
            heading = "Not to be confused"
        if heading is not None:
            line = line.removeprefix("Pitfalls: ").removeprefix("Slots: ")
            sections.setdefault(heading, []).append(_capital(line))
        elif line:
            body.append(line)
    return body, {
        heading: "\n\n    ".join(found) if heading == "Reconstructed" else "\n\n".join(found)
        for heading, found in sections.items()
    }


def _capital(sentence: str) -> str:
    """The sentence with a capital letter, unless it begins with a symbol such as k1."""
    return sentence[:1].upper() + sentence[1:] if sentence[1:2].isalpha() else sentence


def _filled(method: Method, slot: str) -> list[Part]:
    return [part for part in method.slot(slot) if part.name != "default"]


def _domain(name: str) -> str | None:
    """The domain to show a command for; None if the command line has none that fits."""
    allowed = set(DOMAINS) & (recipe_domains(name) or set(DOMAINS))
    for part in recipe(name).parts:
        allowed &= allowed if part.domains is None else part.domains
    return next((domain for domain in ["language", *DOMAINS] if domain in allowed), None)


def _commands(name: str) -> list[str]:
    domain = _domain(name)
    if domain is None:
        return [f'```python\nimport polopt\n\nmethod = polopt.recipe("{name}")\n```']
    flag, keyword = ("", "") if domain == "language" else (f" --domain {domain}", f', domain="{domain}"')
    return [
        f"```console\n$ polopt train --method {name}{flag}\n```",
        "```python\nfrom polopt.cli.building import build\nfrom polopt.config import RunConfig\n\n"
        f'build(RunConfig.create("", method="{name}"{keyword}), out="runs/{name}").run()\n```',
    ]


def _part_commands(own: list[type[Part]]) -> list[str]:
    flags = [_flag(part.slot, part.name) for part in own if _fits(part)]
    return (
        ["```console\n" + "\n".join(f"$ polopt train --method grpo {flag}" for flag in flags) + "\n```"]
        if flags
        else []
    )


def _flag(slot: str, spec: str) -> str:
    return f"--{FLAGS.get(slot, slot)} {spec}"


def _slots(name: str) -> Iterator[str]:
    """The recipe's table: which part fills which slot, with the options that it sets."""
    yield f"Recipe `{name}`: {(recipes()[name].__doc__ or '').strip().partition(chr(10))[0]}"
    for domain, form in forms(name):
        if domain:
            yield f"On the domain {domain} it is:"
        rows = [[slot, ", ".join(map(_spec, form.slot(slot))) or "none"] for slot in SLOTS]
        yield _table(["Slot", "Part"], rows)
        if form.defaults:
            settings = ", ".join(f"`{field} = {value}`" for field, value in form.defaults.items())
            yield f"It sets {settings} of the trainer."


def _spec(part: Part) -> str:
    defaults = part.Config.model_fields
    changed = {
        name: value for name, value in part.config
        if value != defaults[name].get_default(call_default_factory=True)
    }  # fmt: skip
    options = ",".join(f"{name}={_value(value)}" for name, value in changed.items())
    cls = type(part)
    return f"[`{part.name}{':' if options else ''}{options}`][{cls.__module__}.{cls.__qualname__}]"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(part: type[Part]) -> Iterator[str]:
    """The options of a part: name, type, default, range and meaning."""
    summary = (part.__doc__ or "").strip().partition("\n")[0]
    yield f"### {part.slot} `{part.name}`"
    yield f"{equations_in_markdown(summary)} [Source][{part.__module__}.{part.__qualname__}]."
    facts = [f"needs {_code(part.requires)}"] if part.requires else []
    facts += [f"provides {_code(part.provides)}"] if part.provides else []
    facts += [f"works on {_code(part.domains)} alone"] if part.domains else []
    if facts:
        yield f"It {', '.join(facts)}."
    rows = []
    for name, field in part.Config.model_fields.items():
        kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
        kind = kind.replace("typing.", "")
        default = (
            "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
        )
        bounds = [
            f"{COMPARED[type(m).__name__]} {vars_of(m)}"
            for m in field.metadata
            if type(m).__name__ in COMPARED
        ]
        meaning = equations_in_markdown(" ".join((field.description or "").split()))
        rows.append([f"`{name}`", f"`{kind}`", default, ", ".join(bounds), meaning])
    yield _table(["Option", "Type", "Default", "Range", "Meaning"], rows) if rows else "No options."


def vars_of(bound: Any) -> Any:
    """The number of a bound such as `Ge(ge=0)`."""
    return getattr(bound, type(bound).__name__.lower())


def _code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _fits(part: type[Part], into: str = "grpo") -> bool:
    """Whether a recipe takes the part with its default options."""
    try:
        recipe(into, None, **{part.slot: _filling(part, into)})
    except ConfigError:
        return False
    return True


def _filling(part: type[Part], into: str) -> list[str]:
    base = recipe(into).slot("advantage")[0].name
    return [base, part.name] if issubclass(part, AdvantageTransform) else [part.name]


def _combining(names: list[str], own: list[type[Part]]) -> Iterator[str]:
    """What else may go into the recipe's slots, and where its parts may go."""
    for name in names:
        method = recipe(name)
        free = [slot for slot in SLOTS if not _filled(method, slot)]
        taking = [slot for slot in MANY if slot not in free]
        sentence = f"`{name}` leaves {_code(free)} at the classics: any part fits there."
        yield sentence + (f" {_code(taking)}: further parts fit beside its own." if taking else "")
    lines = []
    for part in own:
        if _fits(part) and "grpo" not in names:
            flags = " ".join(_flag(part.slot, spec) for spec in _filling(part, "grpo"))
            lines.append(f"$ polopt train --method grpo {flags}")
    if lines:
        yield "Its parts in another recipe:"
        yield "```console\n" + "\n".join(lines) + "\n```"
    bound = [part for part in own if not _fits(part)]
    for part in bound:
        yield f"`{part.name}` ({part.slot}) works only beside parts that give what it needs, or with options of yours."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_config(config: MkDocsConfig) -> None:
    """Add the pages to the navigation."""
    assert config.nav is not None
    sections: list[Any] = ["methods/index.md"]
    for family, modules in groupby(methods(), key=lambda module: module.removeprefix(PACKAGE).split(".")[0]):
        entries = [{_title(module)[0].partition(" - ")[0]: path_of(module)} for module in modules]
        sections.append({family.replace("_", " ").capitalize(): entries})
    config.nav.append({"Methods": sections})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
