"""The last linear layer and what is asked of its softmax, without ever holding all logits.

Logits are [M, V], for M states of a stream many times the network's other activations. They are computed for some
states at a time, reduced to a few numbers each, and computed again in the backward pass, which forms the gradients of
hidden states and weights directly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.engine.gradient_block import gradient_to_add_to
from polopt.language.second_order import recorded_backward

BLOCK = 2**20
"""Logits in one block of a chunk: reductions run on a block while it is in the cache."""
PIECE = 4096
"""Rows of the weight that are brought to the precision of the products at once."""


@dataclass(frozen=True)
class HeadOptions:
    """How hidden states become logits, and what is asked of them."""

    scale: float = 1.0
    """Factor of the logits: the inverse temperature, and a model's own."""
    softcap: float | None = None
    """The model's bound of its logits, `softcap tanh(logits / softcap)`, before the temperature."""
    chunk: int = 512
    """States whose logits are held at once."""
    entropy: bool = False
    score_sqnorm: bool = False
    tempered: float | None = None
    """Factor of the logits for `tempered_logp`, in place of the inverse temperature."""
    kept: int = 0
    """How many of the largest logits are asked for."""


class HeadOutput(NamedTuple):
    """Of D decisions in M states; None where it was not asked for. Only `logp` and `entropy` have a gradient."""

    logp: Float[Tensor, " D"]
    entropy: Float[Tensor, " M"] | None
    square: Float[Tensor, " M"] | None
    """Sum of the squares of the probabilities."""
    tempered_logp: Float[Tensor, " D"] | None
    kept_logits: Float[Tensor, "M k"] | None
    kept_rows: Int[Tensor, "M k"] | None


def evaluate_head(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    state: Int[Tensor, " D"],
    action: Int[Tensor, " D"],
    options: HeadOptions,
) -> HeadOutput:
    """Log-probabilities of decisions under `softmax(scale * (hidden @ weight.T + bias))`, and what else is asked for.

    Products are of the autocast type where autocast is on; the softmax is at least of float32.

    Args:
        hidden: input of the last layer.
        weight: of the last layer.
        bias: of the last layer.
        state: in which state each decision was made, ascending.
        action: which token was chosen.
        options: what to compute, and how much memory to spend.

    Returns:
        Values in nats. `logp` and `entropy` have a gradient with respect to `hidden`, `weight` and `bias`.
    """
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        return HeadOutput(*_Head.apply(hidden, weight, bias, state, action, options, dtype)[1:])


class _Head(torch.autograd.Function):
    """Holds the logits of the last chunk of states for the backward pass, which computes those of the others again.

    The logits of one chunk are freed before those of the next are made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor,
        action: Tensor,
        options: HeadOptions,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        ctx.options, ctx.dtype, ctx.held = options, dtype, None
        layer, found, logits = _Layer(hidden, weight, bias, dtype), [], None
        for rows in _slices(0, len(hidden), options.chunk):
            logits = None
            logits = layer(rows)
            for block, mine in _blocks(rows, logits, state):
                scaled = _scaled(logits[block.start - rows.start : block.stop - rows.start], options)
                found.append(_reduce(scaled, state[mine] - block.start, action[mine], options))
        if any(ctx.needs_input_grad[:3]):
            ctx.held = logits
        joined = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        normalizer, entropy = joined["normalizer"], joined.get("entropy")
        ctx.save_for_backward(hidden, weight, bias, state, action, normalizer, entropy)
        ctx.mark_non_differentiable(*(t for name, t in joined.items() if name not in ("logp", "entropy")))
        ctx.set_materialize_grads(False)
        return normalizer, *(joined.get(name) for name in HeadOutput._fields)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, state, action, normalizer, entropy = ctx.saved_tensors
        if torch.is_grad_enabled():
            constants = state, action, ctx.options, ctx.dtype
            return recorded_backward(_plain_head, (hidden, weight, bias), grads[1:3], *constants)
        of_logp = normalizer.new_zeros(len(state)) if grads[1] is None else grads[1]
        of_state = torch.zeros_like(normalizer).index_add_(0, state, of_logp)
        layer, held = _Layer(hidden, weight, bias, ctx.dtype), ctx.held
        ctx.held = None
        of_hidden = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        into, of_weight = gradient_to_add_to(weight) if ctx.needs_input_grad[1] else (None, None)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for rows in _slices(0, len(hidden), ctx.options.chunk)[::-1]:
            logits, held = layer(rows) if held is None else held, None
            for block, mine in _blocks(rows, logits, state):
                part = logits[block.start - rows.start : block.stop - rows.start]
                scaled = _scaled(part, ctx.options)
                slope = _slope(scaled, ctx.options)
                scaled.sub_(normalizer[block, None])
                of_logits = scaled.exp()
                if grads[2] is None or entropy is None:
                    of_logits.mul_(-of_state[block, None])
                else:
                    scaled.add_(entropy[block, None]).mul_(grads[2][block, None]).add_(of_state[block, None])
                    of_logits.mul_(scaled.neg_())
                of_logits.index_put_(
                    (state[mine] - block.start, action[mine]), of_logp[mine], accumulate=True
                )
                part.copy_(of_logits.mul_(slope))
            for piece, low in layer.pieces():
                of_hidden[rows] += logits[:, piece] @ low
                if into is not None:
                    into[piece] += logits[:, piece].T @ layer.hidden[rows]
            if of_bias is not None:
                of_bias += logits.sum(0)
            logits = part = None
        return of_hidden.to(hidden.dtype), of_weight, of_bias, None, None, None, None


def _plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    action: Tensor,
    options: HeadOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`logp` and `entropy` with all logits at once."""
    low_bias = None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), low_bias)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap:
        exact = options.softcap * (exact / options.softcap).tanh()
    logprobs = (options.scale * exact).log_softmax(-1)
    return logprobs[state, action], -(logprobs.exp() * logprobs).sum(-1)


class _Layer:
    """The linear layer in the precision of the products, without a copy of its weight."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.hidden, self.weight = hidden.to(dtype), weight
        self.bias = None if bias is None else bias.to(dtype)

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "v H"]]]:
        """The weight, some rows at a time."""
        for piece in _slices(0, len(self.weight), PIECE):
            yield piece, self.weight[piece].to(self.hidden.dtype)

    def __call__(self, rows: slice) -> Float[Tensor, "m V"]:
        """Logits of some states."""
        hidden = self.hidden[rows]
        logits = hidden.new_empty(len(hidden), len(self.weight))
        for piece, low in self.pieces():
            torch.mm(hidden, low.T, out=logits[:, piece])
        return logits if self.bias is None else logits.add_(self.bias)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    """Pieces of a size, the first perhaps smaller; one piece, if an empty one, where there is nothing."""
    ends = range(stop, min(start, stop - 1), -size)
    return [slice(max(end - size, start), end) for end in ends][::-1]


def _blocks(rows: slice, logits: Float[Tensor, "m V"], state: Int[Tensor, " D"]) -> list[tuple[slice, slice]]:
    """Blocks of the states in `rows`, each with the decisions that were made in them."""
    blocks = _slices(rows.start, rows.stop, max(1, BLOCK // logits.shape[1]))
    borders = torch.tensor([block.start for block in blocks] + [rows.stop], device=state.device)
    first = torch.searchsorted(state, borders).tolist()
    return [(block, slice(first[i], first[i + 1])) for i, block in enumerate(blocks)]


def _scaled(logits: Float[Tensor, "m V"], options: HeadOptions) -> Float[Tensor, "m V"]:
    """A copy of logits, in at least float32, bounded and scaled."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if options.softcap:
        scaled.div_(options.softcap).tanh_().mul_(options.softcap)
    return scaled if options.scale == 1 else scaled.mul_(options.scale)


def _slope(scaled: Float[Tensor, "m V"], options: HeadOptions) -> Float[Tensor, "m V"] | float:
    """Derivative of scaled logits with respect to logits."""
    if not options.softcap:
        return options.scale
    return options.scale * (1 - (scaled / (options.softcap * options.scale)).square())


def _reduce(
    scaled: Float[Tensor, "m V"], state: Int[Tensor, " d"], action: Int[Tensor, " d"], options: HeadOptions
) -> dict[str, Tensor]:
    """What is asked of some states' logits, which are overwritten, and of the decisions made in these states."""
    found = {}
    if options.kept:
        found["kept_logits"], found["kept_rows"] = scaled.topk(min(options.kept, scaled.shape[1]))
    top = scaled.amax(-1)
    exponentials = scaled.sub_(top[:, None]).exp()
    total = exponentials.sum(-1)
    found["normalizer"] = top + total.log()
    taken = scaled[state, action]
    found["logp"] = taken - total.log()[state]
    if options.entropy:
        found["entropy"] = total.log() - _dot(exponentials, scaled) / total
    if options.score_sqnorm:
        found["square"] = _dot(exponentials, exponentials) / total.square()
    if options.tempered is not None:
        ratio = options.tempered / options.scale
        found["tempered_logp"] = taken * ratio - scaled.mul_(ratio).exp_().sum(-1).log()[state]
    return found


def _dot(a: Float[Tensor, "m V"], b: Float[Tensor, "m V"]) -> Float[Tensor, " m"]:
    return (a[:, None] @ b[:, :, None])[:, 0, 0]
