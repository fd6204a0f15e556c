"""Backward passes that can be differentiated in their turn.

The model's fused operations compute their derivatives by hand, in place and from what they hold: no graph of that can be
recorded. Where one is asked for (`create_graph`, for Hessian-vector products) they are computed by autograd instead,
from a plain version of the operation, which holds its intermediate results.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recorded_backward(
    plain: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    *constants: Any,
) -> tuple[Tensor | None, ...]:
    """The derivatives of an operation, themselves differentiable.

    Args:
        plain: from the inputs and the constants to the outputs, in operations that autograd knows.
        inputs: tensors, as the forward pass saved them.
        grads: derivative of each output, None for 0.
        constants: further arguments of `plain`.

    Returns:
        A tensor for each input that needs one, and None for each of the constants.
    """
    # aliases: an input may also be what another was computed from, as tied embeddings are
    aliases = [None if t is None else t.view_as(t) for t in inputs]
    outputs = plain(*aliases, *constants)
    pairs = [
        (out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None
    ]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs],
            create_graph=True, allow_unused=True, materialize_grads=True,
        )
    )  # fmt: skip
    of_inputs = [next(found) if t is not None and t.requires_grad else None for t in aliases]
    return *of_inputs, *(None for _ in constants)
