"""Prompts and completions in one stream without padding, every distinct prompt once.

All layers of a transformer but attention treat tokens one by one, so they run on the stream as it is. Attention alone
needs to know which tokens belong together: it reads them into padded rows, one for each prompt and one for each
completion behind its prompt, and writes what comes of them back into the stream. The gradients of a prompt's keys and
values are sums over the completions that attend to it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.errors import ConfigError
from polopt.language.second_order import recorded_backward

ATTENTION = "polopt_packed"
"""Name of `packed_attention` among the attention functions of transformers."""


@dataclass(frozen=True)
class Segment:
    """n consecutive tokens of the stream: B sequences of at most Q, which attend to themselves and what is before them."""

    place: Int[Tensor, " n"]
    """Where each token is among the B x Q entries of the padded sequences."""
    keys: Int[Tensor, "B K"]
    """Where in the stream the tokens are that may be attended to."""
    distance: Int[Tensor, "B Q K"]
    """Positions from a key forward to a query; negative where the query must not attend. Every query attends."""
    masks: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, dtype: torch.dtype, window: int | None) -> Float[Tensor, "B 1 1 Q K"]:
        """0 where a query attends to a key, minus infinity elsewhere."""
        if (dtype, window) not in self.masks:
            unseen = self.distance < 0
            if window is not None:
                unseen |= self.distance >= window
            mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
            self.masks[dtype, window] = mask.masked_fill_(unseen, -torch.inf)[:, None, None]
        return self.masks[dtype, window]

    def pad(self, tokens: Float[Tensor, "n Hq E"], heads: int) -> Float[Tensor, "B Hk RQ E"]:
        """The segment's tokens as padded sequences; the R = Hq / Hk heads that share a key one after another."""
        batch, width = self.distance.shape[:2]
        padded = tokens.new_zeros(batch * width, *tokens.shape[1:]).index_copy_(0, self.place, tokens)
        split = padded.view(batch, width, heads, -1, tokens.shape[-1])
        return split.permute(0, 2, 3, 1, 4).reshape(batch, heads, -1, tokens.shape[-1])

    def unpad(self, padded: Float[Tensor, "B Hk RQ E"]) -> Float[Tensor, "n Hq E"]:
        """What `pad` took."""
        batch, heads, _, size = padded.shape
        split = padded.view(batch, heads, -1, self.distance.shape[1], size).permute(0, 3, 1, 2, 4)
        return split.reshape(batch * self.distance.shape[1], -1, size).index_select(0, self.place)


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
    return Segment(own.flatten().nonzero()[:, 0], keys, distance)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Hq S E"],
    key: Float[Tensor, "1 Hk S E"],
    value: Float[Tensor, "1 Hk S F"],
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 S Hq F"], None]:
    """Attention over a packed stream, as a function of the `AttentionInterface` of transformers.

    Raises:
        ConfigError: the model asks for what this attention does not do.
    """
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if packing is None or unknown or others.get("dropout"):
        lacking = unknown or ["dropout"] if packing is not None else ["attention arguments"]
        raise ConfigError(
            f"model {type(module).__name__}: packed attention does not support its {lacking[0]}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (t[0].transpose(0, 1) for t in (query, key, value))
    dtype = value.dtype
    options = scale, sliding_window, softcap
    packed = _PackedAttention.apply(*(part.to(dtype) for part in parts), packing.segments, options)
    return packed[None], None


class _PackedAttention(torch.autograd.Function):
    """Keeps the stream's queries, keys and values alone, and attends again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "S Hq E"],
        key: Float[Tensor, "S Hk E"],
        value: Float[Tensor, "S Hk F"],
        segments: tuple[Segment, ...],
        options: tuple[float, int | None, float | None],
    ) -> Float[Tensor, "S Hq F"]:
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.options = segments, options
        with torch.autocast(query.device.type, enabled=False):
            return _attend(query, key, value, segments, options)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        if torch.is_grad_enabled():
            return recorded_backward(_attend, (query, key, value), grads, ctx.segments, ctx.options)
        exact = torch.promote_types(key.dtype, torch.float32)
        of_query, of_key, of_value = (
            [],
            torch.zeros_like(key, dtype=exact),
            torch.zeros_like(value, dtype=exact),
        )
        with torch.autocast(query.device.type, enabled=False):
            for (segment, part), (_, grad) in zip(
                _split(query, ctx.segments), _split(grads[0], ctx.segments), strict=True
            ):
                found = _Rows(segment, part, key, value, *ctx.options).backward(
                    segment.pad(grad, key.shape[1])
                )
                of_query.append(segment.unpad(found[0]))
                for total, rows in zip((of_key, of_value), found[1:], strict=True):
                    total.index_add_(0, segment.keys.flatten(), rows.transpose(1, 2).flatten(0, 1).to(exact))
        return torch.cat(of_query), of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], options: tuple[Any, ...]
) -> tuple[Float[Tensor, "S Hq F"]]:
    rows = [_Rows(s, part, key, value, *options) for s, part in _split(query, segments)]
    return (torch.cat([row.segment.unpad(row.attention @ row.value) for row in rows]),)


def _split(stream: Float[Tensor, "S H E"], segments: tuple[Segment, ...]) -> list[tuple[Segment, Tensor]]:
    return list(zip(segments, stream.split([len(segment.place) for segment in segments]), strict=True))


class _Rows:
    """Attention in the padded sequences of a segment, and its derivative."""

    def __init__(
        self,
        segment: Segment,
        query: Float[Tensor, "n Hq E"],
        key: Float[Tensor, "S Hk E"],
        value: Float[Tensor, "S Hk F"],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self.segment, self.scale, self.softcap = segment, scale, softcap
        self.query = segment.pad(query, key.shape[1]).mul_(scale)
        self.key, self.value = (
            t.index_select(0, segment.keys.flatten()).unflatten(0, segment.keys.shape).transpose(1, 2)
            for t in (key, value)
        )
        scores = self.query @ self.key.transpose(2, 3)
        if softcap:
            scores = scores.div_(softcap).tanh_()
            self.slope = 1 - scores.square()
            scores = scores * softcap
        split = scores.unflatten(2, (-1, segment.distance.shape[1]))
        split.add_(segment.mask(scores.dtype, window))
        exact = torch.promote_types(scores.dtype, torch.float32)
        self.attention = scores.softmax(-1, dtype=exact).to(scores.dtype)

    def backward(self, grad: Float[Tensor, "B Hk RQ F"]) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of query, key and value, given that of `attention @ value`."""
        attention = self.attention
        of_scores = torch._softmax_backward_data(
            grad @ self.value.transpose(2, 3), attention, -1, attention.dtype
        )
        if self.softcap:
            of_scores = of_scores * self.slope
        of_query = (of_scores @ self.key).mul_(self.scale)
        return of_query, of_scores.transpose(2, 3) @ self.query, attention.transpose(2, 3) @ grad
