"""Prompts and completions in one stream without padding, every distinct prompt once.

All layers of a transformer but attention treat tokens one by one, so they run on the stream as it is. Attention alone
needs to know which tokens belong together: it reads them into padded rows, one for each prompt and one for each
completion with its prompt before it, and writes the result back into the stream. Gradients of a prompt's keys and
values sum over the completions that attend to them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import ConfigError

ATTENTION = "polopt_packed"


@dataclass(frozen=True)
class Segment:
    """B sequences of Q tokens of the stream, which attend to themselves and to a prefix."""

    queries: Int[Tensor, "B Q"]
    """Where in the stream each sequence's tokens are; its last token again where it is over."""
    keys: Int[Tensor, "B K"]
    """Where the tokens are that it may attend to: the prefix and its own."""
    own: Bool[Tensor, "B Q"]
    """False where the sequence is over."""
    distance: Int[Tensor, "B Q K"]
    """Positions from key to query; negative where the query must not attend."""
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, dtype: torch.dtype, repeats: int, window: int | None) -> Float[Tensor, "B 1 RQ K"]:
        """0 where a query attends to a key and minus infinity elsewhere, for `repeats` query heads in a row."""
        key = dtype, repeats, window
        if key not in self._masks:
            seen = self.distance >= 0
            if window is not None:
                seen &= self.distance < window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._masks[key] = mask[:, None].repeat(1, 1, repeats, 1)
        return self._masks[key]


@dataclass(frozen=True)
class Packing:
    """The rows of a batch as a stream of S tokens, and where its D decisions were made."""

    tokens: Int[Tensor, "1 S"]
    positions: Int[Tensor, "1 S"]
    """Position of each token in its own sequence."""
    segments: tuple[Segment, ...]
    """Prompts, and completions if any has more than one token; together the stream in its order."""
    states: Int[Tensor, " M"]
    """The tokens of the stream after which decisions were made, ascending."""
    state: Int[Tensor, " D"]
    """Which state each decision was made in: decisions are in the order of their states."""
    action: Int[Tensor, " D"]
    """The token that was chosen."""
    row: Int[Tensor, " D"]
    column: Int[Tensor, " D"]
    """Where in the batch the decision is."""


def pack(batch: Batch) -> Packing:
    """Lay out the prompts and completions of a batch.

    A completion reaches to the last true entry of its mask; false entries before that are tokens the policy did not
    choose but saw. The last token is not in the stream, as nothing depends on what follows it.

    Raises:
        ValueError: a prompt is empty.
    """
    payload = batch.payload
    mask, tokens = batch.mask, payload["tokens"]
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = torch.where(mask, columns, 0).amax(1) if mask.shape[1] else mask.new_zeros(len(mask), dtype=torch.int64)
    rows = torch.nonzero(lengths)[:, 0]
    if not len(rows):
        return _nothing(mask)
    _, prompt_of = torch.unique(batch.group[rows], return_inverse=True)
    first = torch.full((int(prompt_of.max()) + 1,), len(mask), device=mask.device)
    first = rows[first.scatter_reduce(0, prompt_of, torch.arange(len(rows), device=mask.device), "amin")]
    prompt_length = payload["prompt_length"][first]
    if int(prompt_length.min()) < 1:
        raise ValueError("evaluate: a prompt has no tokens")
    prompts = _Ragged.at(prompt_length, 0)
    completions = _Ragged.at(lengths[rows] - 1, prompts.total)
    segments = [_prompt_segment(prompts)]
    if completions.total > prompts.total:
        segments.append(_completion_segment(prompts, completions, prompt_of))
    width = max(prompts.width, 1)
    stream = torch.cat([payload["prompt"][first, :width][prompts.own], tokens[rows, : completions.width][completions.own]])
    positions = torch.cat(
        [prompts.column[prompts.own], (prompt_length[prompt_of][:, None] + completions.column)[completions.own]]
    )
    chosen = mask[rows].nonzero()
    which, column = chosen[:, 0], chosen[:, 1]
    after_prompt = prompts.start[prompt_of[which]] + prompt_length[prompt_of[which]] - 1
    at = torch.where(column == 0, after_prompt, completions.start[which] + column - 1)
    order = at.argsort(stable=True)
    states, state = torch.unique_consecutive(at[order], return_inverse=True)
    row, column = rows[which[order]], column[order]
    return Packing(stream[None], positions[None], tuple(segments), states, state, tokens[row, column], row, column)
