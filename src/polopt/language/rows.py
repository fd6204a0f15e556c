"""Examples from the user's own data: JSON lines, a saved `datasets` directory, a Python function."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from polopt.errors import ConfigError
from polopt.language.examples import Example
from polopt.language.graders import require
from polopt.language.worker_process import FunctionSource, describe
from polopt.settings import nearest

Rows = Iterable[Any]
"""Rows, each a mapping from column to value."""
_MAX_ROWS = 5_000_000


def read_jsonl(path: str) -> Rows:
    """The objects of a JSON-lines file.

    Raises:
        ConfigError: no such file, or a line that is not a JSON object.
    """
    if not Path(path).is_file():
        raise ConfigError(f"jsonl:{path}: there is no such file")
    rows = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"jsonl:{path}: line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ConfigError(f"jsonl:{path}: line {number} is not a JSON object")
                rows.append(row)
    return rows


def read_dataset(path: str, split: str) -> Rows:
    """The rows of one split of a directory written by `datasets.save_to_disk`.

    Raises:
        ConfigError: no such directory or split.
        MissingExtraError: `datasets` is not installed.
    """
    require("datasets", f"dataset:{path}")
    if not Path(path).is_dir():
        raise ConfigError(f"dataset:{path}: there is no such directory")
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"dataset:{path}: not a saved data set: {describe(error)}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(
                f"dataset:{path}.split = {split!r}: unknown; {nearest(split, [str(name) for name in found])}"
            )
        return found[split]
    return found


def load_rows_function(source: FunctionSource) -> tuple[ModuleType, Callable[..., Rows]]:
    """The user's file as a module, and the function that gives the rows.

    Raises:
        ConfigError: the file cannot be imported or lacks the function.
    """
    try:
        module = source.import_module()
        return module, source.find(module)
    except Exception as error:
        raise ConfigError(f"{source.module}: cannot load {source.function!r}: {describe(error)}") from error


def call_rows(source: FunctionSource, function: Callable[..., Rows], keywords: dict[str, Any]) -> Rows:
    """The rows that the user's function returns or yields.

    Raises:
        ConfigError: the function raises, returns something else, or does not end.
    """
    where = f"{source.module}: {source.function}"
    try:
        rows = list(islice(function(**keywords), _MAX_ROWS + 1))
    except Exception as error:
        raise ConfigError(f"{where} raised {describe(error)}") from error
    if len(rows) > _MAX_ROWS:
        raise ConfigError(f"{where} gives more than {_MAX_ROWS} rows; does it end?")
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{where} gives a {type(row).__name__} among its rows; each must be a dict")
    return rows


def to_examples(rows: Rows, where: str, prompt: str, answer: str, needs_answer: bool) -> list[Example]:
    """Examples from rows; columns other than prompt and answer become metadata, a `metadata` dict is merged into it.

    Args:
        rows: the rows.
        where: what they are called in messages.
        prompt: column of the prompt, text or chat messages.
        answer: column of the reference answer, text or number.
        needs_answer: whether a missing answer is an error.

    Raises:
        ConfigError: a missing column, or a prompt or answer of another type.
    """
    examples = []
    for number, row in enumerate(rows):
        wanted = [prompt, answer] if needs_answer else [prompt]
        for option, column in zip(("prompt_column", "answer_column"), wanted, strict=False):
            if row.get(column) is None:
                raise ConfigError(
                    f"{where}.{option} = {column!r}: row {number} lacks it; {nearest(column, list(row))}"
                )
        if not _is_prompt(row[prompt]):
            raise ConfigError(
                f"{where}: the prompt of row {number} is neither text nor a list of chat messages"
            )
        if not isinstance(row.get(answer, ""), str | int | float | None):
            raise ConfigError(f"{where}: the answer of row {number} is neither text nor a number")
        extra = {column: value for column, value in row.items() if column not in (prompt, answer, "metadata")}
        given = row.get("metadata")
        metadata = given | extra if isinstance(given, dict) else extra
        text = "" if row.get(answer) is None else str(row[answer])
        examples.append(Example(number, row[prompt], text, metadata))
    if not examples:
        raise ConfigError(f"{where}: there are no rows")
    return examples


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )
