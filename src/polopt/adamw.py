"""AdamW for small networks, where a step's bookkeeping takes longer than its arithmetic."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from polopt.functional.blocks import side_by_side


class _Moments(NamedTuple):
    """Parameters of one device and precision that have taken the same number of steps, and what is remembered of them."""

    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    step: Tensor
    """Steps that they have taken, one tensor for all of them."""


def hookless(step: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a step as one that torch need not wrap for profilers and step hooks, which takes as long as the step."""
    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]
    return step


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, the same bit for bit and in its state, whose lists of tensors are made once, not every step."""

    _moments: dict[int, tuple[list[Tensor], list[_Moments]]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._moments = {}

    @hookless
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the parameters that have a gradient; returns what the closure does."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for number, group in enumerate(self.param_groups):
            trained = [p for p in group["params"] if p.grad is not None]
            for moments in self._of(number, group, trained):
                moments.step.add_(1)
                gradients = [cast(Tensor, p.grad) for p in moments.parameters]
                beta1, beta2 = group["betas"]
                torch._fused_adamw_(
                    moments.parameters, gradients, moments.averages, moments.squares, [],
                    [moments.step] * len(moments.parameters), lr=group["lr"], beta1=beta1, beta2=beta2,
                    weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
                )  # fmt: skip
        return loss

    def _begin(self, parameters: list[Tensor]) -> None:
        """The state of parameters that have taken no step, as torch makes it."""
        for parameter, average, square in zip(
            parameters, _zeros_like(parameters), _zeros_like(parameters), strict=True
        ):
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter].update(step=step, exp_avg=average, exp_avg_sq=square)

    def _of(self, number: int, group: dict[str, Any], trained: list[Tensor]) -> list[_Moments]:
        """The moments of a group's trained parameters, made anew where others are trained than at the step before."""
        known = self.__dict__.setdefault("_moments", {}).get(number)
        if known is not None and len(known[0]) == len(trained) and all(map(_is, known[0], trained)):
            return known[1]
        self._begin([p for p in trained if not self.state[p]])
        together: dict[Any, _Moments] = {}
        for parameter in trained:
            state = self.state[parameter]
            kind = parameter.device, parameter.dtype, float(state["step"])
            moments = together.setdefault(kind, _Moments([], [], [], state["step"].clone()))
            moments.parameters.append(parameter)
            moments.averages.append(state["exp_avg"])
            moments.squares.append(state["exp_avg_sq"])
            state["step"] = moments.step
        self._moments[number] = trained, list(together.values())
        return self._moments[number][1]


def _zeros_like(parameters: list[Tensor]) -> list[Tensor]:
    """Those of plain parameters side by side in memory."""
    plain = [p for p in parameters if type(p) is nn.Parameter and p.is_contiguous()]
    found: dict[Tensor, Tensor] = dict(zip(plain, side_by_side(plain), strict=True))
    return [found[p] if p in found else torch.zeros_like(p) for p in parameters]


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other
