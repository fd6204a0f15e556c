"""Embeddings whose gradient is added where it belongs.

torch makes a gradient of the whole table, zero but for a few hundred rows, for every backward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polopt.engine.gradient_block import gradient_to_add_to
from polopt.language.replaced_forward import replaced_forward
from polopt.language.second_order import recorded_backward


def embedding(
    tokens: Int[Tensor, "..."], weight: Float[Tensor, "V H"], padding: int | None = None
) -> Float[Tensor, "... H"]:
    """The rows `weight[tokens]`; that of `padding` gets no gradient."""
    return _Embedding.apply(weight, tokens, padding)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(weight, tokens)
        ctx.padding = padding
        return _plain(weight, tokens, padding)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, tokens = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *recorded_backward(partial(_plain, tokens=tokens, padding=ctx.padding), (weight,), grads),
                None,
                None,
            )
        into, of_weight = gradient_to_add_to(weight)
        kept = slice(None) if ctx.padding is None else tokens != ctx.padding
        into.index_add_(0, tokens[kept].flatten(), grads[0][kept].flatten(0, -2).to(into.dtype))
        return of_weight, None, None


def _plain(weight: Tensor, tokens: Tensor, padding: int | None) -> tuple[Tensor]:
    return (nn.functional.embedding(tokens, weight, padding),)


def direct_embeddings(model: nn.Module) -> AbstractContextManager[None]:
    """Inside it the plain embeddings of a model are computed by `embedding`."""
    return replaced_forward(model, _replacement)


def _replacement(module: Any) -> Callable[..., Tensor] | None:
    if type(module) is not nn.Embedding or module.max_norm is not None:
        return None
    return None if module.sparse or module.scale_grad_by_freq else _forward


def _forward(layer: Any, tokens: Tensor) -> Tensor:
    return embedding(tokens, layer.weight, layer.padding_idx)
