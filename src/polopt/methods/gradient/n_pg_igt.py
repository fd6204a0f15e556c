r"""N-PG-IGT - normalised policy gradient with implicit gradient transport (arXiv 2302.01734, ICML 2023).

From "Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies".
Averaging the gradients of past iterations removes noise, but they were taken elsewhere. Implicit gradient transport
makes the rollout at an extrapolated policy, so that what is averaged is, up to the curvature of the Hessian, the
gradient at the present one. Then a step of fixed length. No importance weights, no large batches, two further vectors.

.. math::
    \Phi(\tau, \theta) = \sum_t m_t w_t \log\pi_\theta(a_t|s_t), \quad w_t = \sum_{h \ge t} \gamma^h m_h r_h, \quad
    g(\tau, \theta) = \nabla_\theta \Phi \tag{1}

.. math::
    \tilde\theta_t = \theta_t + \frac{1 - \eta_t}{\eta_t} (\theta_t - \theta_{t-1}), \quad
    \tau_t \sim \pi_{\tilde\theta_t} \tag{2}

.. math::
    d_t = (1 - \eta_t) d_{t-1} + \eta_t\, g(\tau_t, \tilde\theta_t), \quad d_0 = g(\tau_0, \theta_0) \tag{3}

.. math::
    \theta_{t+1} = \theta_t + \gamma_t \frac{d_t}{\lVert d_t \rVert} \tag{4}

.. math::
    \eta_t = \min\Big(1, \eta_0 \Big(\frac{2}{t + 2}\Big)^{p}\Big), \quad
    \gamma_t = \gamma_0 \Big(\frac{2}{t + 2}\Big)^{q} \tag{5}

with p = 4/5, q = 1. The exponent in (1) is the absolute time h, not h - t. The norm in (4) is over all parameters
together; without direction nothing moves. :math:`\gamma_0` is the run's learning rate, in units of the parameters.
Transport is exact where the gradient is affine in the parameters: then :math:`d_t` is the gradient at
:math:`\theta_t`. The official code takes the previous iteration's :math:`\eta` in (2), which loses that.

Two baselines of the paper have the same recursion: `nsgdm` without the look-ahead (p = 2/3), `vanilla-pg` without any
average (:math:`\eta = 1`, q = 2/3, no normalisation).

Use it when rollouts are few and noisy and a fixed step length can be chosen. Not when an iteration's data are used more
than once: exactly one update of each rollout is made, without clipping the gradient.

Pitfalls: the look-ahead shrinks slowly (:math:`t^{-1/5}`) and is not clamped; steps that stay large saturate a softmax
policy; with :math:`\gamma < 1` late decisions of long trajectories hardly count.

Slots: optimizer `n-pg-igt` (2) to (5), `nsgdm`, `vanilla-pg`; advantage `discounted-to-go` (1), whose optional baseline
is a polynomial of time alone (the official code's is of time and observation).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.functional.masked import masked_sum, zero_outside
from polopt.functional.returns import outcome_at_last, rewards_to_go
from polopt.method import Method
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.gradient.gradient_average import GradientAverage, transport_share
from polopt.parts import Advantage, Optimizer
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def step_weights(
    rewards: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], gamma: float
) -> Float[Tensor, "N T"]:
    """Equation (1): reward-to-go, discounted by `gamma` to the power of the column; 0 outside the mask."""
    return rewards_to_go(rewards * discounts(rewards, gamma), mask)


def discounts(like: Float[Tensor, "N T"], gamma: float) -> Float[Tensor, " T"]:
    """`gamma` to the power of the column."""
    return gamma ** torch.arange(like.shape[1], dtype=like.dtype, device=like.device)


def score_objective(
    logp: Float[Tensor, "N T"], weights: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, " N"]:
    """Equation (1): Phi of each trajectory, whose gradient is the estimate g; `weights` are constant."""
    return masked_sum(weights.detach() * logp, mask)


class AveragedAscent(Optimizer):
    """What the optimizers of the paper share; the run's learning rate is gamma_0."""

    averages_rollouts = True

    class Config(Settings):
        """Schedules."""

        eta: float = Field(1.0, gt=0)
        """eta_0: weight of the first gradients in the average; weights are at most 1."""
        eta_power: float = Field(0.8, ge=0)
        """p: how fast the weight of the newest gradient decays; 0 keeps it."""
        step_power: float = Field(1.0, ge=0)
        """q: how fast the step size decays; 0 keeps it."""
        normalized: bool = True
        """Steps of fixed length."""

    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> GradientAverage:
        c = self.config
        return GradientAverage(parameters, lr, c.eta, c.eta_power, c.step_power, c.normalized)


@register("n-pg-igt")
class NPGIGT(AveragedAscent):
    """Averaged gradients of look-ahead rollouts and steps of fixed length, equations (2) to (5)."""

    def at_rollout(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        average = cast(GradientAverage, optimizer)
        return average.displaced(transport_share(average.eta))


@register("nsgdm")
class NormalizedMomentum(AveragedAscent):
    """Averaged gradients and steps of fixed length, equations (3) to (5) with rollouts where the parameters are."""

    class Config(AveragedAscent.Config):
        """Schedules."""

        eta_power: float = Field(2 / 3, ge=0)
        """p: how fast the weight of the newest gradient decays; 0 keeps it."""


@register("vanilla-pg")
class VanillaPolicyGradient(AveragedAscent):
    """Plain gradient steps of decaying size."""

    class Config(AveragedAscent.Config):
        """Schedules."""

        eta_power: float = Field(0.0, ge=0)
        """p: how fast the weight of the newest gradient decays; 0 keeps it."""
        step_power: float = Field(2 / 3, ge=0)
        """q: how fast the step size decays; 0 keeps it."""
        normalized: bool = False
        """Steps of fixed length."""


def time_features(like: Float[Tensor, "N T"]) -> Float[Tensor, "T 4"]:
    """1, u, u^2, u^3 with u a hundredth of the column, float64."""
    u = torch.arange(like.shape[1], dtype=torch.float64, device=like.device) / 100
    return torch.stack([u**power for power in range(4)], -1)


@register("discounted-to-go")
class DiscountedToGo(Advantage):
    """Reward-to-go discounted from the trajectory's start, equation (1), less an optional baseline."""

    coefficients: Tensor

    class Config(Settings):
        """Discount and baseline."""

        gamma: float = Field(0.99, ge=0, le=1)
        """Discount per decision."""
        baseline: Literal["none", "time"] = "none"
        """"time": a cubic of time, fitted to the returns of the previous iteration, 0 in the first."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("coefficients", torch.zeros(4, dtype=torch.float64))

    def forward(self, batch: Batch) -> Float[Tensor, "N T"]:
        rewards = decision_rewards(batch)
        weights = step_weights(rewards, batch.mask, self.config.gamma)
        if self.config.baseline == "none":
            return weights
        baseline = time_features(rewards) @ self.coefficients.to(rewards.device)
        return zero_outside(weights - baseline * discounts(rewards, self.config.gamma), batch.mask)

    def observe(self, batch: Batch) -> None:
        if self.config.baseline == "none" or not bool(batch.mask.any()):
            return
        returns = rewards_to_go(decision_rewards(batch), batch.mask, self.config.gamma)
        features = time_features(returns).expand(*batch.mask.shape, 4)[batch.mask]
        ridge = 1e-5 * torch.eye(4, dtype=torch.float64, device=features.device)
        found = torch.linalg.solve(features.T @ features + ridge, features.T @ returns[batch.mask])
        self.coefficients.copy_(found)


def decision_rewards(batch: Batch) -> Float[Tensor, "N T"]:
    """The reward of each decision, float64: the trajectory's own at its last one."""
    rewards = outcome_at_last(batch.rewards.double().nan_to_num(0.0, 0.0, 0.0).sum(-1), batch.mask)
    if batch.step_rewards is not None:
        rewards = rewards + zero_outside(batch.step_rewards.double(), batch.mask)
    return rewards


@register_recipe("n-pg-igt")
def n_pg_igt() -> Method:
    """N-PG-IGT: look-ahead rollouts, averaged gradients and steps of fixed length."""
    return Method(
        advantage=DiscountedToGo(),
        surrogate=ScoreFunction(aggregation="sequence_mean_token_sum"),
        optimizer=NPGIGT(),
        defaults={"lr": 0.1},
    )
