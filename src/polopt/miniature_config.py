"""Configuration of a miniature run, and the standard tasks. Nothing here imports torch."""

from typing import Any

from pydantic import Field

from polopt.settings import Settings


class MiniatureConfig(Settings):
    """The small network, and how it is scored."""

    width: int = Field(default=48, ge=1)
    """Hidden units of the network."""
    sampled_scores: bool = True
    """Held-out scores are of sampled completions, like training; false: of the likeliest tokens."""


class SumModOptions(Settings):
    """Options of the miniature tasks; see `polopt.miniature.SumModTask`."""

    modulus: int = Field(default=6, ge=2)
    """Size of the vocabulary and of the goals' range."""
    length: int = Field(default=4, ge=1)
    """Tokens of each part of a completion."""
    parts: int = Field(default=1, ge=1)
    """Parts of a completion; after each of them the sum must be right."""
    mixed: bool = False
    """Prompts ask for 1, 2, ... `parts` parts in turn, instead of all for `parts`."""
    second_reward: bool = False
    """Also reward completions whose first token is even, as a second reward function."""
    train_size: int = Field(default=60, ge=1)
    """Prompts of the pool."""


STANDARD_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed": ("right sums of one to three parts: easy and hard prompts", {"parts": 3, "mixed": True}),
    "rare": ("right sums of three parts: success is rare at the start", {"parts": 3}),
    "two_rewards": (
        "right sums of two parts, and a first token that is even",
        {"parts": 2, "second_reward": True},
    ),
}
"""By name: what the standard task asks for, and the options that make it."""
STANDARD_SIZES = {"length": 2, "train_size": 72}
"""Options that the standard tasks share."""


def standard_options(name: str, **options: Any) -> SumModOptions:
    """The options of a standard task, with some of them set otherwise.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    return SumModOptions.create(
        f"miniature:{name}", **{**STANDARD_SIZES, **STANDARD_TASKS[name][1], **options}
    )
