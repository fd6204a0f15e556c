"""What the documentation shows can be typed as it stands."""

import re
from pathlib import Path

import pytest

from polopt.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "reproductions").rglob("README.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]


def commands(text: str) -> list[list[str]]:
    """The polopt commands of a page's indented and fenced lines, without comments; continued lines are joined.

    A command whose answer is shown as a refusal is left out.
    """
    joined = re.sub(r"\\\n\s*", " ", text)
    shown = r"^(?:    |\$ )(?:torchrun .* -m )?polopt (\w+) ?(.*)$(?!\npolopt: )"
    return [
        [found[1], *re.sub(r"\s#.*", "", found[2]).split()]
        for found in re.finditer(shown, joined, re.MULTILINE)
    ]


SHOWN = [(page.relative_to(ROOT), command) for page in PAGES for command in commands(page.read_text())]


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """By command: the flags of its help; filled as it is asked."""
    return {}


def test_commands_are_found() -> None:
    page = "    polopt train \\\n        --seed 3  # a comment\n$ polopt tasks\npolopt in prose\n$ polopt eval --x\npolopt: --x"
    assert commands(page) == [
        ["train", "--seed", "3"],
        ["tasks"],
    ]
    assert len(SHOWN) > 20


@pytest.mark.parametrize(
    ("page", "command"), SHOWN, ids=[f"{page}: {' '.join(command)}" for page, command in SHOWN]
)
def test_command_has_the_flags_that_are_shown(
    page: Path, command: list[str], known: dict[str, set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    name = command[0]
    if name not in known:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        known[name] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    flags = {argument.partition("=")[0] for argument in command if argument.startswith("--")}
    assert flags <= known[name], page


def test_example_of_a_method_is_included() -> None:
    assert '\n--8<-- "examples/new_method.py"\n' in (ROOT / "docs" / "new_method.md").read_text()
