"""The prompts that both libraries train on: sums, as a chat question or after four worked examples."""

import random
from typing import Any

SCENARIOS: dict[str, dict[str, Any]] = {
    "chat": {"max_new_tokens": 32, "newline_stops": False},
    "few_shot": {"max_new_tokens": 8, "newline_stops": True},
}
"""A chat prompt answered with up to 32 tokens, and a four-shot plain prompt answered in one short line."""
PROMPTS, ROLLOUTS = 16, 8


def questions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Question and answer of `count` sums of two numbers of one or two digits."""
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
    return [
        (f"State the final answer to the following arithmetic problem: {a} + {b} =", str(a + b))
        for a, b in pairs
    ]


def prompt(scenario: str, question: str) -> str | list[dict[str, str]]:
    """The prompt of a question: chat messages, or plain text after four worked examples."""
    if scenario == "chat":
        return [{"role": "user", "content": question}]
    shots = "".join(f"Q: {q}\nA: {a}\n" for q, a in questions(4, seed=1))
    return f"{shots}Q: {question}\nA:"


def last_number_is(completion: str, answer: str) -> float:
    """1 if the last whole number of the completion is the answer."""
    words = "".join(c if c.isdigit() else " " for c in completion).split()
    return float(bool(words) and words[-1] == answer)
