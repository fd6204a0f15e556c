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
    output = _GatedLinears.apply(x, gate, up, down, dtype)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        opening, opened = (x.to(dtype) @ _stacked(gate, up, dtype).T).chunk(2, -1)
        product = nn.functional.silu(opening).mul_(opened)
        torch.matmul(product, down.to(dtype).T, out=output.detach())
    return output


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
            of_weight = _add_to_gradient(weight, grad.T @ x.to(ctx.dtype).flatten(0, -2))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(bias.dtype)
        return of_x, of_weight, of_bias, None


class _GatedLinears(torch.autograd.Function):
    """Records the operation, whose output is computed afterwards; a layer that is computed again for its records stops there.

    It keeps its input alone, a fifth of what it would hold; the backward pass computes the inner products again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.dtype = dtype
        return x.new_empty(*x.shape[:-1], len(down), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return recorded_backward(_plain_gated, ctx.saved_tensors, grads, ctx.dtype)
        x, gate, up, down = ctx.saved_tensors
        flat, grad = x.to(ctx.dtype).flatten(0, -2), grads[0].flatten(0, -2)
        inner = _stacked(gate, up, ctx.dtype)
        of_inner = flat @ inner.T
        opening, opened = of_inner.chunk(2, -1)
        active = nn.functional.silu(opening)
        of_x = of_gate = of_up = of_down = None
        if ctx.needs_input_grad[3]:
            of_down = _add_to_gradient(down, grad.T @ (active * opened))
        of_product = grad @ down.to(ctx.dtype)
        torch.ops.aten.silu_backward.grad_input(opened.mul_(of_product), opening, grad_input=opening)
        torch.mul(of_product, active, out=opened)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_gate, of_up = (of_inner.T @ flat).chunk(2)
            of_gate = _add_to_gradient(gate, of_gate) if ctx.needs_input_grad[1] else None
            of_up = _add_to_gradient(up, of_up) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            of_x = (of_inner @ inner).view(x.shape).to(x.dtype)
        return of_x, of_gate, of_up, of_down, None


def _stacked(
    gate: Float[Tensor, "hidden in"], up: Float[Tensor, "hidden in"], dtype: torch.dtype
) -> Float[Tensor, "2*hidden in"]:
    """Two weights in another type; one large product costs less than two."""
    stacked = gate.new_empty(2 * len(gate), gate.shape[1], dtype=dtype)
    for half, weight in zip(stacked.chunk(2), (gate, up), strict=True):
        half.copy_(weight)
    return stacked


def _add_to_gradient(weight: Float[Tensor, "out in"], product: Float[Tensor, "out in"]) -> Tensor | None:
    """Add to the gradient of a weight; what the backward pass returns for it."""
    into, returned = gradient_to_add_to(weight)
    into.add_(product)
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
