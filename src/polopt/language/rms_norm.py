"""Root-mean-square normalisation as one operation, which keeps its input alone for the backward pass.

Layer by layer as transformers has it, it keeps two float32 tensors and, under autocast, one bfloat16 copy of its output
for every linear layer that reads it: a third of the memory of a training pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.language.replaced_forward import replaced_forward
from polopt.language.second_order import recorded_backward


def rms_norm(
    hidden: Float[Tensor, "... H"], weight: Float[Tensor, " H"], epsilon: float
) -> Float[Tensor, "... H"]:
    """`weight * hidden / sqrt(mean(hidden^2) + epsilon)`, in at least float32.

    Returns:
        The autocast type where autocast is on, as linear layers read it; else the type of `hidden`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _RmsNorm.apply(hidden, weight, epsilon, dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True).add_(epsilon))
        ctx.save_for_backward(hidden, weight, inverse)
        ctx.constants = epsilon, dtype
        return (exact * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return recorded_backward(_plain, (hidden, weight), grads, *ctx.constants)
        normal = hidden.to(inverse.dtype) * inverse
        grad = grads[0].to(inverse.dtype)
        of_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        radial = (grad * normal).mean(-1, keepdim=True)
        return grad.sub_(normal.mul_(radial)).mul_(inverse).to(hidden.dtype), of_weight, None, None


def _plain(hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor]:
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return ((exact * inverse * weight).to(dtype),)


def fused_norms(model: nn.Module) -> AbstractContextManager[None]:
    """Inside it the norms of Llama's form in a model are computed by `rms_norm`, but for float64 ones.

    They are recognised by what transformers calls them; `check_model` would find one that is none.
    """
    return replaced_forward(model, _replacement)


def _replacement(module: Any) -> Callable[..., Tensor] | None:
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return _forward if named and module.weight.dtype != torch.float64 else None


def _forward(norm: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
