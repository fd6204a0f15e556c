"""Attention over a packed stream: into padded rows, and back into the stream.

It reads the tokens that belong together into padded rows, one for each prompt and one for each completion behind its prompt, and
writes what comes of them back. The gradients of a prompt's keys and values are sums over the completions that attend to it.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polopt.errors import ConfigError
from polopt.language.packing import Heads, Packing, Segment

ATTENTION = "polopt_packed"
"""Name of `packed_attention` among the attention functions of transformers."""


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
    queries, keys, values = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    parts = queries.split([segment.length for segment in packing.segments])
    with torch.autocast(query.device.type, enabled=False):
        outputs = [
            _attend(segment, part, keys, values, scale, sliding_window, softcap)
            for segment, part in zip(packing.segments, parts, strict=True)
        ]
        return torch.cat(outputs)[None], None


def _attend(
    segment: Segment,
    query: Float[Tensor, "n Hq E"],
    key: Float[Tensor, "S Hk E"],
    value: Float[Tensor, "S Hk F"],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Tensor, "n Hq F"]:
    """What the queries of a segment get; the R = Hq / Hk heads that share a key are one sequence of RQ queries."""
    heads = segment.heads(query.shape[1], key.shape[1])
    sequences = len(segment.keys) * key.shape[1]
    rows = _Pad.apply(query.flatten(0, 1), heads).view(sequences, -1, query.shape[2])
    keys, values = (
        _gathered(t.flatten(0, 1), heads.keys).view(sequences, -1, t.shape[2]) for t in (key, value)
    )
    scores = rows.mul(scale) @ keys.mT
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    mask = segment.mask(scores.dtype, window)
    scores.view(len(segment.keys), -1, *mask.shape[2:]).add_(mask)
    exact = torch.promote_types(scores.dtype, torch.float32)
    outputs = scores.softmax(-1, dtype=exact).to(scores.dtype) @ values
    return _Unpad.apply(outputs.flatten(0, 1), heads).view(len(query), -1, value.shape[2])


def _gathered(rows: Float[Tensor, "m E"], places: Int[Tensor, " k"]) -> Float[Tensor, "k E"]:
    """Rows of keys or values; the gradient of a row is summed in at least float32."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(exact).index_select(0, places).to(rows.dtype)


class _Pad(torch.autograd.Function):
    """Rows of the segment's stream among the padded queries, 0 where there is none."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "n*Hq E"], heads: Heads) -> Float[Tensor, "B*Hq*Q E"]:
        ctx.heads = heads
        return rows.index_select(0, heads.queries).index_fill_(0, heads.padding, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Unpad.apply(grads[0], ctx.heads), None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`, and its derivative."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "B*Hq*Q E"], heads: Heads) -> Float[Tensor, "n*Hq E"]:
        ctx.heads = heads
        return rows.index_select(0, heads.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Pad.apply(grads[0], ctx.heads), None
