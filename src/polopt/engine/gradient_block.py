"""Gradients side by side in memory; see `polopt.functional.blocks`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from polopt.functional.blocks import side_by_side

SMALLEST = 2**24
"""Parameters below which it is not worth while."""
_places: ContextVar[dict[Tensor, Tensor] | None] = ContextVar("gradient places", default=None)


@contextmanager
def gradients_in_one_block(module: nn.Module) -> Iterator[None]:
    """Inside, a gradient that a plain parameter gets for the first time moves into a new block made for all of them."""
    parameters: list[Tensor] = [
        p for p in module.parameters() if p.requires_grad and p.grad is None and type(p) is nn.Parameter
    ]
    if sum(p.numel() for p in parameters) < SMALLEST:
        yield
        return
    places = dict(zip(parameters, side_by_side(parameters), strict=True))

    def move(parameter: Tensor) -> None:
        place = places[parameter]
        if parameter.grad is not None and parameter.grad is not place:
            parameter.grad = place.copy_(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(move) for p in parameters]
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)
        for hook in hooks:
            hook.remove()


def gradient_to_add_to(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """For the backward pass of an operation with a large parameter, of which it uses some entries at a time.

    Returns:
        Where it adds the parameter's gradient, and what it returns for it: the same tensor, of zeros; or, where the
        parameter's own gradient takes it directly, nothing.
    """
    places = _places.get()
    if places is None or parameter not in places:
        zeros = torch.zeros_like(parameter)
        return zeros, zeros
    if parameter.grad is None:
        parameter.grad = places[parameter]
    return parameter.grad, None
