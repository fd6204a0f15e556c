"""Linear layers under autocast that keep no copy of their weights for the backward pass.

Autocast makes a copy of every weight in its own type and keeps all of them from the forward pass to the backward pass: half
of the memory of a float32 model. Casting a weight once more costs little beside the products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.language.second_order import recorded_backward


def linear(
    x: Float[Tensor, "... in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """`x @ weight.T + bias`, of the autocast type where autocast is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, torch.get_autocast_dtype(device))


def gated_linear(
    gate: Float[Tensor, "... in"], up: Float[Tensor, "... in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "... out"]:
    """`(silu(gate) * up) @ weight.T`, of the autocast type where autocast is on."""
    device = gate.device.type
    if not torch.is_autocast_enabled(device):
        return nn.functional.linear(nn.functional.silu(gate) * up, weight)
    return _GatedLinear.apply(gate, up, weight, torch.get_autocast_dtype(device))


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
            of_weight = (grad.T @ x.to(ctx.dtype).flatten(0, -2)).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(bias.dtype)
        return of_x, of_weight, of_bias, None


class _GatedLinear(torch.autograd.Function):
    """Keeps the gate and what it gates; the product and the activation are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.dtype = dtype
        return _plain_gated(gate, up, weight, dtype)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return recorded_backward(_plain_gated, (gate, up, weight), grads, ctx.dtype)
        active, of_weight = nn.functional.silu(gate), None
        if ctx.needs_input_grad[2]:
            inputs = (active * up).to(ctx.dtype).flatten(0, -2)
            of_weight = (grads[0].flatten(0, -2).T @ inputs).to(weight.dtype)
        of_product = (grads[0] @ weight.to(ctx.dtype)).to(gate.dtype)
        of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
        return of_gate, of_product.mul_(active), of_weight, None


def _plain_gated(gate: Tensor, up: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    return _plain(nn.functional.silu(gate) * up, weight, None, dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        low_bias = None if bias is None else bias.to(dtype)
        return (nn.functional.linear(x.to(dtype), weight.to(dtype), low_bias),)


@contextmanager
def lean_linears(model: nn.Module) -> Iterator[None]:
    """Inside it the linear layers of a model are computed by `linear`, and Llama's gated ones by `gated_linear`.

    The gated ones are recognised by what transformers calls their parts; `check_model` would find one that is none.
    """
    changed: list[Any] = [
        module for module in model.modules() if type(module) is nn.Linear or _is_gated(module)
    ]
    for module in changed:
        module.forward = partial(_gated_forward if _is_gated(module) else _forward, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_gated(module: Any) -> bool:
    return (
        all(hasattr(module, name) for name in ("gate_proj", "up_proj"))
        and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and type(down := getattr(module, "down_proj", None)) is nn.Linear
        and down.bias is None
    )


def _forward(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _gated_forward(block: Any, x: Tensor) -> Tensor:
    return gated_linear(block.gate_proj(x), block.up_proj(x), block.down_proj.weight)
