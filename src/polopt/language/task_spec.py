"""The form of a language task's spec: one task, or several joined by "+"."""

import re

_JOINT = re.compile(r"\+(?=(?:builtin|reasoning_gym|jsonl|dataset|python):)")


def split_spec(spec: str) -> list[str]:
    """The specs of a mixture's tasks, or the spec alone. A "+" inside a file's name joins nothing.

    Example:
        >>> split_spec("builtin:add+jsonl:a+b.jsonl")
        ['builtin:add', 'jsonl:a+b.jsonl']
    """
    return _JOINT.split(spec)
