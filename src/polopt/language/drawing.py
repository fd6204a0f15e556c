"""Drawing tokens from logits by inverting the cumulative distribution, with their log-probabilities and entropies.

The uniform number of each row comes from outside, so what a row draws depends on nothing but its logits and its number.
The cumulative distribution is searched on two levels, first over sums of blocks of the vocabulary and then inside one
block, which is exact and needs no cumulative sum over the vocabulary.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.errors import PoloptError

CHUNK = 2**19
"""Logits treated at once: few enough to stay in cache between the passes over them."""
BLOCK = 128
"""Tokens in one block of the vocabulary."""


class Draw(NamedTuple):
    """One token for each row, and what is known about the distribution it came from."""

    tokens: Int[Tensor, " N"]
    logp: Float[Tensor, " N"]
    """Log-probability under softmax(logits / temperature), in nats."""
    sampler_logp: Float[Tensor, " N"]
    """Log-probability under the truncation of it that was drawn from; `logp` itself where nothing is truncated."""
    entropy: Float[Tensor, " N"]
    """Entropy of softmax(logits / temperature), in nats."""


def draw_tokens(
    logits: Float[Tensor, "N V"],
    uniforms: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Draw:
    """Draw one token for each row.

    Top-k keeps the k likeliest tokens, top-p then the fewest likeliest ones with at least that share of what is left;
    tokens exactly as likely as the least likely of those are kept with them.

    Args:
        logits: any floating point type; minus infinity is a token of probability 0.
        uniforms: numbers in [0, 1]; a larger one draws a token of a larger index.
        temperature: what the logits are divided by. At 0 the likeliest token (the first of several) has probability 1.
        top_k: number of tokens to keep; 0: all.
        top_p: share of the probability to keep, in (0, 1].

    Returns:
        Log-probabilities and entropies in float32, or float64 for float64 logits.

    Raises:
        PoloptError: a row has no finite largest logit, or a NaN.
    """
    if temperature == 0:
        return _greedy(logits)
    rows = max(1, CHUNK // logits.shape[-1])
    chunks = zip(logits.split(rows), uniforms.split(rows), strict=True)
    drawn = [_draw_chunk(part, numbers.double(), temperature, top_k, top_p) for part, numbers in chunks]
    tokens, logp, sampler_logp, entropy = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Draw(tokens, logp, sampler_logp if top_k > 0 or top_p < 1 else logp, entropy)


def invert_cdf(weights: Float[Tensor, "N W"], uniforms: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The first index of each row up to which more than `uniforms` of the row's weight lies.

    Never an index of weight 0, whatever the rounding.

    Args:
        weights: not negative, of positive sum in each row.
        uniforms: numbers in [0, 1].
    """
    blocks = _blocks(weights, 0.0)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniforms.double().unsqueeze(-1) * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = cumulative.gather(-1, (block - 1).clamp(min=0)) * (block > 0)
    inside = _take_block(blocks, block).cumsum(-1, dtype=torch.float64)
    return (block * BLOCK + _first_above(inside, target - before)).squeeze(-1)


def _first_above(cumulative: Float[Tensor, "N B"], target: Float[Tensor, "N 1"]) -> Int[Tensor, "N 1"]:
    """First index whose cumulative weight is above the target, which is taken as below the last one at most."""
    last = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cumulative, target, right=True)


def _blocks(values: Float[Tensor, "N W"], padding: float) -> Float[Tensor, "N B w"]:
    """The values in blocks, the last one padded."""
    missing = -values.shape[-1] % BLOCK
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=padding)
    return values.reshape(len(values), -1, BLOCK)


def _take_block(blocks: Float[Tensor, "N B w"], block: Int[Tensor, "N 1"]) -> Float[Tensor, "N w"]:
    return blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)


def _draw_chunk(
    logits: Float[Tensor, "N V"], uniforms: Float[Tensor, " N"], temperature: float, top_k: int, top_p: float
) -> Draw:
    """All passes over the vocabulary, in base 2: exp2 is three times as fast as exp on CPUs, and as exact."""
    bits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bits = (bits - bits.amax(-1, keepdim=True)).mul_(1 / (temperature * math.log(2)))
    weights = torch.exp2(bits)
    total = weights.sum(-1)
    normalizer = total.log()
    _check(normalizer)
    mean_bits = torch.linalg.vecdot(weights, bits) / total
    if not bool(mean_bits.isfinite().all()):  # 0 * -inf for tokens of probability 0
        mean_bits = (weights * bits.clamp(min=torch.finfo(bits.dtype).min)).sum(-1) / total
    kept = truncate(weights, top_k, top_p) if top_k > 0 or top_p < 1 else total
    tokens = invert_cdf(weights, uniforms)
    log_weight = bits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * math.log(2)
    entropy = (normalizer - mean_bits * math.log(2)).clamp(min=0)
    return Draw(tokens, log_weight - normalizer, log_weight - kept.log(), entropy)


def _greedy(logits: Float[Tensor, "N V"]) -> Draw:
    blocks = _blocks(logits, -math.inf)
    largest, block = blocks.amax(-1).max(-1, keepdim=True)
    _check(largest)
    tokens = (block * BLOCK).squeeze(-1) + _take_block(blocks, block).argmax(-1)
    certain = torch.zeros(
        len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device
    )
    return Draw(tokens, certain, certain, certain)


def _check(numbers: Float[Tensor, "..."]) -> None:
    if not bool(numbers.isfinite().all()):
        raise PoloptError(
            "logits: NaN or infinite; the weights of the model have diverged, restart from a checkpoint"
        )


def truncate(weights: Float[Tensor, "N V"], top_k: int, top_p: float) -> Float[Tensor, " N"]:
    """Set the weights of the tokens that top-k and top-p drop to 0, in place; the sums of those kept."""
    if 0 < top_k < weights.shape[-1]:
        least = weights.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        weights.masked_fill_(weights < least, 0)
    if top_p < 1:
        weights.masked_fill_(weights < _nucleus_edge(weights, top_p * weights.sum(-1)), 0)
    return weights.sum(-1)


def _nucleus_edge(weights: Float[Tensor, "N V"], mass: Float[Tensor, " N"]) -> Float[Tensor, "N 1"]:
    """Smallest weight among the fewest largest ones that together have at least `mass`.

    Looks at the few largest weights of each row first, and at more of them in the rows where those do not suffice.
    """
    edge = torch.zeros_like(mass)
    open_rows = torch.arange(len(weights), device=weights.device)
    size = 64
    while len(open_rows):
        size = min(size, weights.shape[-1])
        largest = weights[open_rows].topk(size).values
        short = largest.cumsum(-1, dtype=torch.float64) < mass[open_rows].unsqueeze(-1)
        reached = ~short[:, -1] | (size == weights.shape[-1])
        position = short.sum(-1).clamp(max=size - 1)
        edge[open_rows[reached]] = largest.gather(-1, position.unsqueeze(-1)).squeeze(-1)[reached]
        open_rows, size = open_rows[~reached], 16 * size
    return edge.unsqueeze(-1)
