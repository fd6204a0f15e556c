"""Linear layers under autocast that keep no copy of their weights for the backward pass.

Autocast makes a copy of every weight in its own type and keeps all of them from the forward pass to the backward pass: half
of the memory of a float32 model. Casting a weight once more costs little beside the products.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.engine.gradient_block import gradient_to_add_to
from polopt.language.replaced_forward import replaced_forward
from polopt.language.second_order import recorded_backward

PIECE = 128
"""Rows of a weight whose gradient is brought to its precision at once, in the cache."""


def linear(
    x: Float[Tensor, "... in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """`x @ weight.T + bias`, of the autocast type where autocast is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, torch.get_autocast_dtype(device))


def gated_linears(
    x: Float[Tensor, "... in"],
    gate: Float[Tensor, "hidden in"],
    up: Float[Tensor, "hidden in"],
    down: Float[Tensor, "out hidden"],
) -> Float[Tensor, "... out"]:
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T`, of the autocast type where autocast is on."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _GatedLinears.apply(x, gate, up, down, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.dtype = dtype
        return _plain(x, weight, bias, dtype)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return recorded_backward(_plain, (x, weight, bias), grads, ctx.dtype)
        grad = grads[0].flatten(0, -2)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (grads[0] @ weight.to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _add_product(weight, grad, x.to(ctx.dtype).flatten(0, -2))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(bias.dtype)
        return of_x, of_weight, of_bias, None


class _GatedLinears(torch.autograd.Function):
    """Keeps its input alone, a fifth of what it would hold; the two inner products are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.dtype = dtype
        opening, opened = (_plain(x, weight, None, dtype)[0] for weight in (gate, up))
        return _plain(nn.functional.silu(opening, inplace=True).mul_(opened), down, None, dtype)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return recorded_backward(_plain_gated, ctx.saved_tensors, grads, ctx.dtype)
        x, gate, up, down = (tensor.to(ctx.dtype) for tensor in ctx.saved_tensors)
        weights = ctx.saved_tensors[1:]
        of_weights: list[Tensor | None] = [None] * 3
        flat, grad = x.flatten(0, -2), grads[0].flatten(0, -2)
        opening, opened = flat @ gate.T, flat @ up.T
        active = nn.functional.silu(opening)
        if ctx.needs_input_grad[3]:
            of_weights[2] = _add_product(weights[2], grad, active * opened)
        of_product = grad @ down
        of_opening = torch.ops.aten.silu_backward(opened.mul_(of_product), opening)
        of_opened = of_product.mul_(active)
        for number, inner in enumerate((of_opening, of_opened)):
            if ctx.needs_input_grad[number + 1]:
                of_weights[number] = _add_product(weights[number], inner, flat)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_opening @ gate).add_(of_opened @ up).view(x.shape).to(ctx.saved_tensors[0].dtype)
        return of_x, *of_weights, None


def _add_product(
    weight: Float[Tensor, "out in"], grad: Float[Tensor, "n out"], x: Float[Tensor, "n in"]
) -> Tensor | None:
    """Add `grad.T @ x` to the gradient of a weight; what the backward pass returns for it."""
    into, returned = gradient_to_add_to(weight)
    product = grad.T @ x
    for rows in product.split(PIECE):
        into[: len(rows)].add_(rows)
        into = into[len(rows) :]
    return returned


def _plain_gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    opening, opened = (_plain(x, weight, None, dtype)[0] for weight in (gate, up))
    return _plain(nn.functional.silu(opening) * opened, down, None, dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        low_bias = None if bias is None else bias.to(dtype)
        return (nn.functional.linear(x.to(dtype), weight.to(dtype), low_bias),)


def lean_linears(model: nn.Module) -> AbstractContextManager[None]:
    """Inside it the linear layers of a model are computed by `linear`, and Llama's gated ones by `gated_linears`.

    The gated ones are recognised by what transformers calls their parts; `check_model` would find one that is none.
    """
    return replaced_forward(model, _replacement)


def _replacement(module: Any) -> Callable[..., Tensor] | None:
    if _is_gated(module):
        return _gated_forward
    return _forward if type(module) is nn.Linear else None


def _is_gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(type(part) is nn.Linear and part.bias is None for part in parts)
    return plain and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _forward(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _gated_forward(block: Any, x: Tensor) -> Tensor:
    return gated_linears(x, block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)
