"""The recursion of averaged gradients that `n_pg_igt` and `harpg` share, as an optimizer of torch.

Equation numbers are those of `n_pg_igt` (arXiv 2302.01734).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def decayed(first: float, power: float, t: int) -> float:
    """Equation (5) without the bound: `first (2 / (t + 2))^power` of iteration t from 0."""
    return first * (2 / (t + 2)) ** power


def averaging_weight(first: float, power: float, t: int) -> float:
    """Equation (5): the share of iteration t's own gradient in the average, at most 1."""
    return min(1.0, decayed(first, power, t))


def extrapolated(theta: Tensor, previous: Tensor, share: float) -> Tensor:
    """`theta + share (theta - previous)`: equation (2) with share (1 - eta) / eta, a point between the two with -1 to 0."""
    return theta + share * (theta - previous)


def transport_share(eta: float) -> float:
    """Equation (2): how far to look ahead, in last steps."""
    return (1 - eta) / eta


def averaged(gradient: Tensor, average: Tensor | None, eta: float) -> Tensor:
    """Equation (3); the gradient itself if there is no average yet."""
    return gradient.clone() if average is None else (1 - eta) * average + eta * gradient


def joint_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all entries of all tensors, sharded ones included, taken in float64."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    whole = [getattr(norm, "full_tensor", lambda norm=norm: norm)() for norm in norms]
    return float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in whole])))


class GradientAverage(torch.optim.Optimizer):
    """Steps along an average of the gradients' opposites, equations (3) to (5).

    Each parameter's state is `average` (d of the last step) and `previous` (its value before the last step).

    Args:
        parameters: what is trained.
        lr: step size at t = 0; with `normalized` the length of the step.
        eta: weight of the first gradients after the very first.
        eta_power: p, how fast it decays.
        step_power: q, how fast the step size decays.
        normalized: divide the step by the norm of the average, over all parameters together.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        eta: float,
        eta_power: float,
        step_power: float,
        normalized: bool,
    ) -> None:
        options = {"eta": eta, "eta_power": eta_power, "step_power": step_power, "normalized": normalized}
        super().__init__(parameters, {"lr": lr, "updates": 0} | options)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return self.param_groups[0]["params"]

    @property
    def started(self) -> bool:
        """There was a step."""
        return self.param_groups[0]["updates"] > 0

    @property
    def eta(self) -> float:
        """Weight of the next gradient."""
        group = self.param_groups[0]
        return averaging_weight(group["eta"], group["eta_power"], group["updates"])

    @property
    def step_size(self) -> float:
        """Size of the next step."""
        group = self.param_groups[0]
        return decayed(group["lr"], group["step_power"], group["updates"])

    def last_step(self) -> list[Tensor]:
        """What the last step added to each parameter."""
        return [p.detach() - self.state[p]["previous"] for p in self.parameters]

    @contextmanager
    def displaced(self, share: float) -> Iterator[None]:
        """Inside it the parameters are displaced by `share` times the last step; not at all before the first."""
        if not self.started or share == 0:
            yield
            return
        here = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p in self.parameters:
                p.copy_(extrapolated(p, self.state[p]["previous"], share))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, here, strict=True):
                    p.copy_(value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Average in the gradients, none of them counting as 0, and move."""
        eta, size, averages = self.eta, self.step_size, []
        for p in self.parameters:
            state, gradient = self.state[p], torch.zeros_like(p) if p.grad is None else -p.grad
            state["average"] = averaged(gradient, state.get("average"), eta)
            state["previous"] = p.detach().clone()
            averages.append(state["average"])
        norm = joint_norm(averages) if self.param_groups[0]["normalized"] else 1.0
        for p, average in zip(self.parameters, averages, strict=True):
            if norm > 0:
                p.add_(average / norm, alpha=size)
        self.param_groups[0]["updates"] += 1
