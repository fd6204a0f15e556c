"""Symbolic equality of mathematical answers; loaded in worker processes only, where a hang can be killed.

math-verify's own time-outs use SIGALRM, which works on main threads only and cannot interrupt native code: they are
off here.
"""

from functools import lru_cache
from typing import Any

from math_verify import parse, verify


def equal(completion: str, answer: str) -> float:
    """1.0 if `completion`, an extracted answer, denotes the same mathematical object as the reference `answer`.

    Raises:
        ValueError: the reference answer is not mathematics.
    """
    reference = _parsed(answer)
    if not reference:
        raise ValueError(f"the reference answer {answer[:80]!r} is not mathematics")
    return float(verify(reference, _parsed(completion), timeout_seconds=None))


@lru_cache(1024)
def _parsed(text: str) -> list[Any]:
    delimited = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    return parse(text if delimited else f"${text}$", parsing_timeout=0)
