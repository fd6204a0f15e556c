"""Gradients side by side in memory; see `polopt.functional.blocks`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from polopt.functional.blocks import side_by_side

SMALLEST = 2**24
"""Parameters below which it is not worth while."""


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
        place = places.pop(parameter, None)
        if place is not None and parameter.grad is not None:
            parameter.grad = place.copy_(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(move) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
