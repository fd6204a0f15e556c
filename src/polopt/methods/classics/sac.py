r"""SAC - Soft Actor-Critic (Haarnoja et al., arXiv 1801.01290, 2018).

The policy maximises reward plus entropy. It climbs a critic at actions that it draws anew, in states from a replay buffer,
so it learns from decisions that any earlier policy made.

.. math::
    L_\pi = \mathrm{mean}\big[\lambda\log\pi_\theta(a_\theta|s) - Q_1(s, a_\theta)\big], \quad
    a_\theta = \tanh(\mu_\theta(s) + \sigma_\theta(s)\,\epsilon) \tag{1}

.. math::
    L_V = \tfrac12\,\mathrm{mean}\big[(V(s) - \min_i Q_i(s, a_\theta) + \lambda\log\pi_\theta(a_\theta|s))^2\big] \tag{2}

.. math::
    L_Q = \tfrac12\sum_i\mathrm{mean}\big[(Q_i(s, a) - r - (1 - d)\gamma\bar V(s'))^2\big], \quad
    \bar V \leftarrow (1-\tau)\bar V + \tau V \tag{3}

d is 1 where the episode terminated at s'; one that a time limit cut is bootstrapped. Gradients of (1) reach the policy
alone, through the action, those of (2) and (3) the critics alone. As in the published code a small penalty on the outputs
of the policy's network keeps it from saturating, and (1) has the first critic where the paper's text has the smaller one.
The temperature is fixed, as in the paper; it is not tuned to an entropy.

Slots: advantage `zero`, since (1) reads none; surrogate `sac` (1); regularizers `soft_critics` (2, 3), which takes the
temperature of the surrogate, and `squared_outputs`.

Use it for continuous actions where environment steps cost more than computing: it takes one optimizer step per environment
step. Not for discrete actions, and not where simulation is cheap: `ppo` then needs less time.

Pitfalls: rewards of another scale need another temperature. Nothing is learned before `learning_starts` decisions. A
checkpoint holds the replay buffer, so write few.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.returns import outcome_at_last
from polopt.method import Method
from polopt.parts import Advantage, Regularizer, Surrogate
from polopt.registry import register, register_recipe

OFF_POLICY_DEFAULTS: dict[str, Any] = {
    "iterations": 2000, "prompts": 1, "rollouts": 1, "buffer_size": 1_000_000, "batch_size": 256,
    "learning_starts": 10_000, "lr": 3e-4, "max_grad_norm": math.inf, "checkpoint_every": 200,
}  # fmt: skip
"""100,000 steps of one environment at the horizon's default; gradients are not clipped."""


def soft_value_target(
    q1: Float[Tensor, "*shape"],
    q2: Float[Tensor, "*shape"],
    logp: Float[Tensor, "*shape"],
    temperature: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """What the state value is fitted to in equation (2), constant."""
    return (torch.minimum(q1, q2) - temperature * logp).detach()


def soft_q_target(
    reward: Float[Tensor, "*shape"],
    terminated: Float[Tensor, "*shape"],
    next_value: Float[Tensor, "*shape"],
    gamma: float,
) -> Float[Tensor, "*shape"]:
    """What both critics are fitted to in equation (3), constant; `next_value` is the target network's."""
    return (reward + (1 - terminated) * gamma * next_value).detach()


@register("zero")
class NoAdvantage(Advantage):
    """0 everywhere: for losses that read no advantage."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        return batch.old_logp.new_zeros(len(batch), 1)


class SoftSurrogate(Surrogate):
    """A policy loss at actions drawn anew. Subclasses define `decision_loss`."""

    any_origin = True
    zero_advantage_is_silent = False
    provides = frozenset({"temperature"})

    class Config(Surrogate.Config):
        """Options of entropy-regularised losses."""

        temperature: float = Field(0.2, ge=0)
        """Weight lambda of the entropy, in units of reward per nat; the critics take it from here."""

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        return {"temperature": batch.old_logp.new_full((len(batch),), self.config.temperature)}


@register("sac")
class SoftActor(SoftSurrogate):
    """The soft policy loss, equation (1)."""

    requires = frozenset({"fresh_logp", "fresh_q"})

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return self.config.temperature * evaluation.fresh_logp - evaluation.fresh_q[..., 0]


@register("soft_critics")
class SoftCritics(Regularizer):
    """The losses of state value and twin critics, equations (2) and (3)."""

    requires = frozenset(
        {"value", "q", "next_value", "fresh_logp", "fresh_q", "step_rewards", "terminated", "temperature"}
    )

    class Config(Regularizer.Config):
        """Options of the critics."""

        coef: float = Field(1.0, ge=0)
        """Weight of the critics' losses."""
        gamma: float = Field(0.99, ge=0, le=1)
        """Discount per decision."""
        polyak: float = Field(0.005, gt=0, le=1)
        """Share tau by which the target network moves to the value network in each optimizer step."""

    def evaluation_options(self) -> dict[str, Any]:
        return {"polyak": self.config.polyak}

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        temperature = batch.signal("temperature")[:, None].to(evaluation.value)
        ended = outcome_at_last(batch.terminated.to(evaluation.value), batch.mask)
        q1, q2 = evaluation.fresh_q.unbind(-1)
        state = soft_value_target(q1, q2, evaluation.fresh_logp, temperature)
        backup = soft_q_target(batch.step_rewards, ended, evaluation.next_value, self.config.gamma)
        of_q = (evaluation.q - backup[..., None]).square().sum(-1)
        return ((evaluation.value - state).square() + of_q) / 2


@register("squared_outputs")
class SquaredOutputs(Regularizer):
    """Mean square of the means and of the log standard deviations of the policy's Gaussian."""

    requires = frozenset({"squared_outputs"})

    class Config(Regularizer.Config):
        """Weight of the penalty."""

        coef: float = Field(1e-3, ge=0)
        """Coefficient of the penalty in the loss."""

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return evaluation.squared_outputs


@register_recipe("sac", domain="control")
def sac() -> Method:
    """Soft actor-critic with a fixed temperature: one step on 256 replayed decisions per environment step."""
    return Method(
        advantage=NoAdvantage(),
        surrogate=SoftActor(),
        regularizers=[SoftCritics(), SquaredOutputs()],
        defaults=OFF_POLICY_DEFAULTS,
    )
