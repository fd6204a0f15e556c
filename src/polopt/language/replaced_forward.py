"""Computing some modules of a model otherwise for a while, without a change to the model's code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def replaced_forward(
    model: nn.Module, replacement: Callable[[nn.Module], Callable[..., Any] | None]
) -> Iterator[None]:
    """Inside it, each module for which there is a replacement is computed by that, given the module and its inputs."""
    changed: list[Any] = []
    try:
        for module in model.modules():
            if (forward := replacement(module)) is not None:
                module.forward = partial(forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
