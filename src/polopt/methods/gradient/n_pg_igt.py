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

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
from polopt.parts import Advantage, Optimizer
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def decayed(first: float, power: float, t: int) -> float:
    """Equation (5) without the bound: `first (2 / (t + 2))^power` of iteration t from 0."""
    return first * (2 / (t + 2)) ** power


def averaging_weight(first: float, power: float, t: int) -> float:
    """Equation (5): the share of iteration t's own gradient in the average, at most 1."""
    return min(1.0, decayed(first, power, t))


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
