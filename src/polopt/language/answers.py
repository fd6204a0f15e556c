"""Final answers: taken out of a completion, and brought into one form so that equal answers are equal texts.

All in time linear in the text, except for a pattern of the user's own (`regex:`), which therefore belongs in a worker.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from polopt.errors import ConfigError
from polopt.settings import nearest

Extractor = Callable[[str], str | None]
EXTRACTIONS = {
    "last_number": "the last number of the completion",
    "first_line": "the first line",
    "whole": "the whole completion",
    "boxed": r"the content of the last \boxed{...}",
    "tag:NAME": "the content of the last <NAME>...</NAME>",
    "regex:PATTERN": "the last match of PATTERN: its first group if it has one",
}
"""The ways to find the final answer, by spec."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
_SIGN = r"[-+\u2212]"
_IN_TEXT = re.compile(rf"(?:(?<![\w)\]]){_SIGN}\$?)?{_NUMBER}(?:/[0-9]+(?![.0-9]))?")
_ALONE = re.compile(rf"({_SIGN}?)\$?({_NUMBER})(?:/([0-9]+))?%?")


def extractor(spec: str) -> Extractor:
    """The function that finds the final answer in a completion; None where there is none.

    Args:
        spec: one of `EXTRACTIONS`.

    Raises:
        ConfigError: unknown spec, or a pattern that does not compile.

    Example:
        >>> extractor("tag:answer")("I guess <answer> 12 </answer>")
        '12'
        >>> extractor("last_number")("7 of 1,200 is not -3.5.")
        '-3.5'
    """
    kind, _, argument = spec.partition(":")
    if spec in _PLAIN:
        return _PLAIN[spec]
    if kind == "tag" and argument.isidentifier():
        return lambda completion: _tag(completion, argument)
    if kind == "regex" and argument:
        try:
            pattern = re.compile(argument, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"extract = {spec!r}: not a regular expression: {error}") from None
        return lambda completion: _last_match(completion, pattern)
    raise ConfigError(f"extract = {spec!r}: unknown; {nearest(spec, list(EXTRACTIONS))}")


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number written as 12, -1,234.5, 3/4, 1e-3, $5 or 5%; None if it is not one.

    Signs, thousands separators and currency or percent signs are read over: 5% is 5.
    """
    match = _ALONE.fullmatch(text.strip().removesuffix("."))
    if not match:
        return None
    sign, number, denominator = match.groups()
    try:
        value = Fraction(number.replace(",", "")) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts; a zero denominator
        return None
    return -value if sign in ("-", "\u2212") else value


def normalize(text: str) -> str:
    """Text in which neither spacing, nor Unicode composition, nor a full stop at the end makes a difference."""
    return " ".join(unicodedata.normalize("NFC", text).split()).removesuffix(".").rstrip()


def canonical(text: str) -> str:
    """One spelling per answer: the reduced fraction for a number, otherwise the normalised text.

    Example:
        >>> canonical("0.50"), canonical("2/4"), canonical(" a  b.")
        ('1/2', '1/2', 'a b')
    """
    number = parse_number(text)
    try:
        return normalize(text) if number is None else str(number)
    except ValueError:  # more digits than Python writes
        return normalize(text)


def _last_number(completion: str) -> str | None:
    return _last_match(completion, _IN_TEXT)


def _first_line(completion: str) -> str | None:
    return completion.partition("\n")[0].strip() or None


def _whole(completion: str) -> str | None:
    return completion.strip() or None


def _boxed(completion: str) -> str | None:
    start = completion.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    if start < len("\\boxed{"):
        return None
    for end in range(start, len(completion)):
        depth += {"{": 1, "}": -1}.get(completion[end], 0)
        if depth == 0:
            return completion[start:end].strip() or None
    return None


def _tag(completion: str, name: str) -> str | None:
    end = completion.rfind(f"</{name}>")
    start = completion.rfind(f"<{name}>", 0, max(end, 0))
    return None if start < 0 else completion[start + len(name) + 2 : end].strip() or None


def _last_match(completion: str, pattern: re.Pattern[str]) -> str | None:
    matches = deque(pattern.finditer(completion), maxlen=1)
    if not matches:
        return None
    return (matches[0].group(min(1, pattern.groups)) or "").strip() or None


_PLAIN: dict[str, Extractor] = {
    "last_number": _last_number,
    "first_line": _first_line,
    "whole": _whole,
    "boxed": _boxed,
}
