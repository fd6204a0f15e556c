"""Layers that keep their input alone for the backward pass, which computes them again.

What a layer holds is four times its input. With the memory saved, micro-batches can be several times larger, and every
micro-batch costs a pass over all weights and their gradients.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import nn

from polopt.language.replaced_forward import replaced_forward


def recomputed_layers(
    model: nn.Module, computed: Callable[[nn.Module], AbstractContextManager[None]]
) -> AbstractContextManager[None]:
    """Inside it the layers of one of transformers' models keep their input alone.

    Args:
        model: the model.
        computed: the contexts in which a layer is computed, to compute it again in the same way.
    """

    def forward(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(
            type(layer).forward,
            layer,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _Again(computed, layer)),
            **options,
        )

    def replacement(module: nn.Module) -> Callable[..., Any] | None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return forward if isinstance(module, GradientCheckpointingLayer) else None

    return replaced_forward(model, replacement)


class _Again(ExitStack):
    """The contexts of a layer, entered anew in each backward pass."""

    def __init__(
        self, computed: Callable[[nn.Module], AbstractContextManager[None]], layer: nn.Module
    ) -> None:
        super().__init__()
        self.computed, self.layer = computed, layer

    def __enter__(self) -> "_Again":
        self.enter_context(self.computed(self.layer))
        return self
