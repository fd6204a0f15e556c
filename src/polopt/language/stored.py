"""Completions that are already there: rollouts of a data set instead of the policy's own."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.errors import ConfigError
from polopt.language.completions import Completions
from polopt.language.examples import Example

COMPLETIONS, SCORES = "completions", "scores"
"""Columns of the data: for each prompt a list of texts and, if there are any, a list of numbers."""


def stored_completions(
    examples: Sequence[Example], counts: Sequence[int], tokenizer: Any, max_new_tokens: int
) -> Completions:
    """The first `counts[i]` completions stored with example i, as if they had been sampled.

    A completion ends with the end-of-sequence token, or is cut at `max_new_tokens`. Log-probabilities and entropies are 0:
    nothing is known of the policy they come from.

    Raises:
        ConfigError: an example has too few completions, or they are not texts.
    """
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for example, count in zip(examples, counts, strict=True)
        for text in _stored(example, COMPLETIONS, str, count)
    ]
    lengths = torch.tensor([min(len(row), max_new_tokens) for row in rows], dtype=torch.int64)
    mask = torch.arange(int(lengths.max()) if rows else 0) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    tokens[mask] = torch.tensor([token for row in rows for token in row[:max_new_tokens]], dtype=torch.int64)
    nothing = torch.zeros(mask.shape)
    finished = torch.tensor([len(row) <= max_new_tokens for row in rows], dtype=torch.bool)
    return Completions(tokens, mask, nothing, nothing, nothing, finished)


def stored_scores(examples: Sequence[Example], counts: Sequence[int]) -> Float[Tensor, " N"] | None:
    """The scores stored with those completions; None if the data has none.

    Raises:
        ConfigError: some examples have scores and others not, or they are not finite numbers.
    """
    if not any(SCORES in example.metadata for example in examples):
        return None
    found = [
        score
        for example, count in zip(examples, counts, strict=True)
        for score in _stored(example, SCORES, int | float, count)
    ]
    return torch.tensor(found, dtype=torch.float64)


def _stored(example: Example, column: str, kind: Any, count: int) -> list[Any]:
    found = example.metadata.get(column)
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        raise ConfigError(f"language.stored: prompt {example.prompt_id} has no list in the column {column!r}")
    if column == SCORES and not all(math.isfinite(score) for score in found):
        raise ConfigError(f"language.stored: prompt {example.prompt_id} has scores that are not finite")
    if len(found) < count:
        raise ConfigError(
            f"trainer.rollouts: prompt {example.prompt_id} has {len(found)} stored {column}, and {count} are asked for"
        )
    return found[:count]
