r"""Ascent - the plain gradient step, and the natural gradient (Amari, 1998; Kakade, 2001).

The step of the classic policy gradients, without moments, and of the natural ones, whose length is measured by how far
the policy moves instead of its parameters. With scores u, the gradients of the trajectories' log-probabilities:

.. math::
    \theta \leftarrow \theta + \beta_jg\ \text{or}\ \theta + \beta_j(E[uu^\top]+\lambda I)^{-1}g,\quad
    \beta_j=\beta_0\frac{\beta_c}{\beta_c+j} \tag{step}

The Fisher matrix is that of the whole iteration and, with `memory`, of earlier ones. It is held by its leading
directions, so it may have more rows than there are trajectories.

Slots: optimizer `ascent` with state (the number of updates, the Fisher matrix).

Use it when the learning rate is to mean what a paper's does, and with `natural` where parameters differ much in what
they do to the policy. Not for large networks without `natural`: AdamW needs no tuning of the rate there.

Pitfalls: the natural step is about 1 / ridge times the plain one in directions in which no score lies, such as those
along which only a critic or a regularizer acts. The gradient is clipped to `max_grad_norm` before the metric is applied.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation
from polopt.methods.gradient.fisher import Fisher, FisherConfig, FisherEstimator
from polopt.parts import Optimizer
from polopt.registry import register


class _Ascent(torch.optim.Optimizer):
    """Gradient steps, through `precondition` if there is one."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, owner: "Ascent") -> None:
        super().__init__(parameters, {"lr": lr})
        self._owner = owner

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Descend the loss."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        direction = self._owner.direction(torch.cat([g.flatten().double() for g in gradients]))
        rate = self.param_groups[0]["lr"] * self._owner.rate
        for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            parameter.sub_(rate * part.view_as(parameter).to(parameter))


@register("ascent")
class Ascent(Optimizer):
    """Plain or natural gradient ascent with a decaying rate, equation (step); the metric is the whole iteration's."""

    class Config(FisherConfig):
        """Options of the step."""

        natural: bool = False
        """Multiply the gradient with the inverse Fisher matrix."""
        decay: float | None = Field(None, gt=0)
        """beta_c of the rate's schedule, in updates (paper: 500); None: constant."""

    updates: Tensor

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        c = self.config
        self.requires = frozenset({"scores"}) if c.natural else frozenset()
        self.fisher = FisherEstimator(c.ridge, c.memory, c.rank)
        self._metric: Fisher | None = None
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def rate(self) -> float:
        """Share of the learning rate that the schedule leaves."""
        c = self.config
        return 1.0 if c.decay is None else c.decay / (c.decay + float(self.updates))

    def direction(self, gradient: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The direction of the step; that of the gradient until an iteration has been seen."""
        return gradient if self._metric is None else self._metric.solve(gradient[None])[0]

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        if self.config.natural and bool(batch.mask.any()):
            scores = batch.scores[batch.mask.any(-1), 0]
            self._metric = self.fisher(scores, len(scores))
        return {}

    def after_step(self, evaluation: Evaluation, batch: Batch) -> None:
        self.updates += 1

    def observe(self, batch: Batch) -> None:
        if self.config.natural:
            scores = batch.scores[batch.mask.any(-1), 0]
            self.fisher.observe(scores, len(scores))

    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return _Ascent(parameters, lr, self)
