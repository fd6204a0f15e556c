r"""(N)-HARPG - (normalised) Hessian-aided recursive policy gradient (arXiv 2302.01734, ICML 2023).

From "Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies".
Averaging the gradients of past iterations removes noise, but they were taken elsewhere. A second rollout at a random
point of the last step estimates by how much the gradient has changed along it, and the average is corrected by that:
no importance weights, no large batches, two further vectors.

.. math::
    B(\tau, \theta) = \nabla\Phi\, \nabla\log p(\tau|\theta)^\top + \nabla^2\Phi, \quad
    \Phi = \sum_t m_t w_t \log\pi_\theta(a_t|s_t), \quad \nabla\log p = \sum_t m_t \nabla\log\pi_\theta(a_t|s_t) \tag{1}

.. math::
    B v = \nabla\Phi\, \langle\nabla\log p, v\rangle + \nabla\langle\nabla\Phi, v\rangle \tag{2}

.. math::
    q_t \sim U[0, 1], \quad \hat\theta_t = q_t \theta_t + (1 - q_t) \theta_{t-1}, \quad
    \hat\tau_t \sim \pi_{\hat\theta_t}, \quad
    v_t = B(\hat\tau_t, \hat\theta_t) (\theta_t - \theta_{t-1}) \tag{3}

.. math::
    d_t = (1 - \eta_t) (d_{t-1} + v_t) + \eta_t\, g(\tau_t, \theta_t), \quad d_0 = g(\tau_0, \theta_0) \tag{4}

.. math::
    \theta_{t+1} = \theta_t + \gamma_t d_t \ \text{(HARPG)}, \quad
    \theta_{t+1} = \theta_t + \gamma_t \frac{d_t}{\lVert d_t \rVert} \ \text{(N-HARPG)} \tag{5}

.. math::
    \eta_t = \min\Big(1, \frac{2\eta_0}{t + 2}\Big), \quad \gamma_t = \gamma_0 \Big(\frac{2}{t + 2}\Big)^{1/2}
    \ \text{(HARPG)}, \quad \gamma_t = \frac{2\gamma_0}{t + 2} \ \text{(N-HARPG)} \tag{6}

N-PG-IGT of the same paper moves the rollout instead. (2) is taken for each trajectory and then averaged: the mean of
the gradients times the mean inner product is another thing, and the official code's; the score in (1) carries no
weights. With another surrogate, the derivative of its loss with respect to the log-probabilities, held constant, is w.
:math:`\gamma_0` is the run's learning rate. While :math:`\eta_t = 1` there is nothing to correct and no second rollout.

Use it when an estimate of the gradient is worth a second rollout, and rewards are bounded. Not when an iteration's data
are used more than once: exactly one update of each rollout is made, without clipping the gradient.

Pitfalls: the noise of the product grows with the step times the squared return, so large :math:`\gamma_0` or unbounded
costs diverge; an iteration takes twice the rollouts, and prompts, that its settings say; the policy's evaluation must
be differentiable twice, and parameters whole on every rank.

Slots: optimizer `harpg` (2) to (6); advantage and surrogate as in N-PG-IGT.
"""

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from polopt.method import Method
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.gradient.gradient_average import GradientAverage, transport_share
from polopt.methods.gradient.n_pg_igt import DiscountedToGo
from polopt.parts import Draw, HessianProduct, Optimizer
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def corrected(gradient: Tensor, product: Tensor, eta: float) -> Tensor:
    """The gradient whose average by `eta` is equation (4): `g + v (1 - eta) / eta`."""
    return gradient + transport_share(eta) * product


@register("harpg")
class HARPG(Optimizer):
    """Averaged gradients, corrected by a Hessian-vector product of a second rollout, equations (2) to (6)."""

    averages_rollouts = True
    second_rollout = True

    class Config(Settings):
        """Schedules."""

        normalized: bool = False
        """N-HARPG: steps of fixed length."""
        eta: float = Field(1.0, gt=0)
        """eta_0: weight of the first gradients in the average; weights are at most 1."""
        eta_power: float = Field(1.0, ge=0)
        """How fast the weight of the newest gradient decays; 0 keeps it."""
        step_power: float | None = Field(None, ge=0)
        """How fast the step size decays; 1 if normalized and 1/2 if not where it is not given."""

    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> GradientAverage:
        c = self.config
        step_power = (1.0 if c.normalized else 0.5) if c.step_power is None else c.step_power
        return GradientAverage(parameters, lr, c.eta, c.eta_power, step_power, c.normalized)

    def correct_gradient(
        self, optimizer: torch.optim.Optimizer, hessian_product: HessianProduct, draw: Draw
    ) -> None:
        average = cast(GradientAverage, optimizer)
        if average.eta < 1:
            q = float(torch.rand((), generator=draw("segment"), dtype=torch.float64))
            self.correct_at(q, average, hessian_product)

    def correct_at(self, q: float, optimizer: GradientAverage, hessian_product: HessianProduct) -> None:
        """Equations (3), (4) with a given q: change the parameters' `.grad`, if there was a step before."""
        if not optimizer.started:
            return
        step = optimizer.last_step()
        with optimizer.displaced(q - 1):
            product = hessian_product(step)
        for p, found in zip(optimizer.parameters, product, strict=True):
            p.grad = corrected(torch.zeros_like(p) if p.grad is None else p.grad, found, optimizer.eta)


@register_recipe("harpg")
def harpg() -> Method:
    """HARPG: gradients averaged with a Hessian correction."""
    return _with(HARPG())


@register_recipe("n-harpg")
def n_harpg() -> Method:
    """N-HARPG: gradients averaged with a Hessian correction, and steps of fixed length."""
    return _with(HARPG(normalized=True))


def _with(optimizer: Optimizer) -> Method:
    return Method(
        advantage=DiscountedToGo(),
        surrogate=ScoreFunction(aggregation="sequence_mean_token_sum"),
        optimizer=optimizer,
        defaults={"lr": 0.1},
    )
