"""Prompts and completions in one stream without padding, every distinct prompt once.

All layers of a transformer but attention treat tokens one by one, so they run on the stream as it is. Attention alone
needs to know which tokens belong together: it reads them into padded rows, one for each prompt and one for each
completion behind its prompt, and writes what comes of them back into the stream. The gradients of a prompt's keys and
values are sums over the completions that attend to it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.batch import Batch


class Heads(NamedTuple):
    """Where the heads of a segment's tokens are, in tensors with a row for each head of each token.

    In the stream these are token by token, S x H; among the padded sequences head by head, B x H x Q or B x H x K.
    """

    queries: Int[Tensor, " B*Hq*Q"]
    """The row in the segment's stream of each padded query; any where there is none."""
    padding: Int[Tensor, " p"]
    """The padded queries where there is none."""
    outputs: Int[Tensor, " n*Hq"]
    """The padded query of each row in the segment's stream."""
    keys: Int[Tensor, " B*Hk*K"]
    """The row in the whole stream of each key."""


@dataclass(frozen=True)
class Segment:
    """n consecutive tokens of the stream: B sequences of at most Q, which attend to themselves and what is before them."""

    own: Bool[Tensor, "B Q"]
    """Which entries of the padded sequences are tokens; one after another they are the segment."""
    keys: Int[Tensor, "B K"]
    """Where in the stream the tokens are that may be attended to."""
    distance: Int[Tensor, "B Q K"]
    """Positions from a key forward to a query; negative where the query must not attend. Every query attends."""
    length: int
    """n."""
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Masks and heads, which layers alike have in common."""

    def mask(self, dtype: torch.dtype, window: int | None) -> Float[Tensor, "B 1 Q K"]:
        """0 where a query attends to a key, minus infinity elsewhere."""
        if (dtype, window) not in self.shared:
            unseen = self.distance < 0
            if window is not None:
                unseen |= self.distance >= window
            mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
            self.shared[dtype, window] = mask.masked_fill_(unseen, -torch.inf)[:, None]
        return self.shared[dtype, window]

    def heads(self, of_query: int, of_key: int) -> Heads:
        """For numbers of heads; consecutive heads of queries share one of keys."""
        if (of_query, of_key) not in self.shared:
            token = (self.own.flatten().cumsum(0) - 1).view(self.own.shape)
            padded = torch.arange(self.own.numel() * of_query, device=token.device)
            outputs = padded.view(len(token), of_query, -1).transpose(1, 2)[self.own].flatten()
            padding = (~self.own)[:, None].expand(-1, of_query, -1).flatten().nonzero()[:, 0]
            self.shared[of_query, of_key] = Heads(
                _by_head(token, of_query), padding, outputs, _by_head(self.keys, of_key)
            )
        return self.shared[of_query, of_key]


@dataclass(frozen=True)
class Packing:
    """The rows of a batch as a stream of S tokens, and the M states of it in which D decisions were made."""

    tokens: Int[Tensor, " S"]
    positions: Int[Tensor, " S"]
    """Position of each token in its own sequence."""
    segments: tuple[Segment, ...]
    """Prompts, and completions if any has more than one token; one after another they are the stream."""
    states: Int[Tensor, " M"]
    """The tokens of the stream after which decisions were made, ascending."""
    state: Int[Tensor, " D"]
    """In which of the states each decision was made, ascending."""
    action: Int[Tensor, " D"]
    """The token that was chosen."""
    row: Int[Tensor, " D"]
    column: Int[Tensor, " D"]
    """Where in the batch the decision is."""


def pack(batch: Batch) -> Packing:
    """Lay out the prompts and completions of a batch of at least one row.

    A completion reaches to the last true entry of its mask; false entries before that are tokens the policy saw but did
    not choose. Its last token is not in the stream, as nothing depends on what would follow.

    Raises:
        ValueError: a prompt is empty.
    """
    mask, payload = batch.mask, batch.payload
    assert payload is not None
    lengths = completion_lengths(mask)
    rows = lengths.nonzero()[:, 0] if bool(lengths.any()) else lengths.new_zeros(1)
    first, prompt_of = _distinct(batch.group[rows])
    prompt_length = payload["prompt_length"][rows[first]]
    if int(prompt_length.min()) < 1:
        raise ValueError("prompt_length: a prompt has no tokens")
    prompt_at, prompt_own = _ragged(prompt_length, 0)
    seen = (lengths[rows] - 1).clamp(min=0)
    at, own = _ragged(seen, int(prompt_length.sum()))
    prompt_position = torch.arange(prompt_own.shape[1], device=mask.device).expand_as(prompt_own)
    position = prompt_length[prompt_of, None] + torch.arange(own.shape[1], device=mask.device)

    prompts = prompt_at, prompt_own, prompt_position
    segments = [_segment(prompt_own, prompt_position, *prompts)]
    if len(some := seen.nonzero()[:, 0]):
        behind = [
            torch.cat([t[prompt_of[some]], u[some]], 1)
            for t, u in zip(prompts, (at, own, position), strict=True)
        ]
        segments.append(_segment(own[some], position[some], *behind))
    chosen, column = mask[rows].nonzero().unbind(1)
    state = torch.cat([prompt_at[prompt_of, -1:], at], 1)[chosen, column]
    order = state.argsort(stable=True)
    chosen, column = chosen[order], column[order]
    states, state = torch.unique_consecutive(state[order], return_inverse=True)
    tokens = payload["tokens"][rows]
    prompts = payload["prompt"][rows[first], : prompt_own.shape[1]]
    return Packing(
        tokens=torch.cat([prompts[prompt_own], tokens[:, : own.shape[1]][own]]),
        positions=torch.cat([prompt_position[prompt_own], position[own]]),
        segments=tuple(segments),
        states=states,
        state=state,
        action=tokens[chosen, column],
        row=rows[chosen],
        column=column,
    )


def completion_lengths(mask: Bool[Tensor, "N T"]) -> Int[Tensor, " N"]:
    """Tokens of each completion, up to the last that the policy chose."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def _distinct(group: Int[Tensor, " R"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " R"]]:
    """The first row of each group, and of each row its group from 0."""
    found, group_of = group.unique(return_inverse=True)
    numbers = torch.arange(len(group), device=group.device)
    first = numbers.new_zeros(len(found)).scatter_reduce(0, group_of, numbers, "amin", include_self=False)
    return first, group_of


def _ragged(lengths: Int[Tensor, " B"], offset: int) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """Where in the stream sequences of these lengths are, one after another from `offset` on, and which entries count.

    Entries beyond the end repeat the last one.
    """
    columns = torch.arange(int(lengths.max()), device=lengths.device)
    start = offset + lengths.cumsum(0) - lengths
    return start[:, None] + torch.minimum(columns, lengths[:, None] - 1), columns < lengths[:, None]


def _segment(
    own: Bool[Tensor, "B Q"],
    position: Int[Tensor, "B Q"],
    keys: Int[Tensor, "B K"],
    present: Bool[Tensor, "B K"],
    key_position: Int[Tensor, "B K"],
) -> Segment:
    last = torch.where(own, position, 0).amax(1, keepdim=True)
    distance = torch.minimum(position, last)[:, :, None] - key_position[:, None, :]
    distance = torch.where(present[:, None], distance, -1).to(torch.int32)
    return Segment(own, keys, distance, int(own.sum()))


def _by_head(tokens: Int[Tensor, "B W"], heads: int) -> Int[Tensor, " B*heads*W"]:
    """Rows of the heads of tokens, head by head."""
    head = torch.arange(heads, device=tokens.device)
    return (tokens[:, None] * heads + head[:, None]).flatten()
