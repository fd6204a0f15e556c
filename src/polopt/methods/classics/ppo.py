r"""PPO - Proximal Policy Optimization Algorithms (Schulman et al., arXiv 1707.06347, 2017).

The ratio to the policy that made the data is clipped, so that several passes over the same data stay near it; a learned
critic gives the baseline by generalised advantage estimation (arXiv 1506.02438).

.. math::
    A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}, \quad \delta_t = r_t + \gamma V_{t+1} - V_t \tag{1}

.. math::
    \ell_t = \max(-A_t r_t, -A_t\,\mathrm{clip}(r_t, 1-\epsilon_l, 1+\epsilon_h)) \tag{2}

.. math::
    \ell^V_t = \tfrac12\max\big((V_t-R_t)^2, (\mathrm{clip}(V_t, V^{old}_t\pm\epsilon_V)-R_t)^2\big), \quad
    R_t = A_t+V^{old}_t \tag{3}

With a dual clip c (arXiv 1912.09729) the loss of a decision with A < 0 is at most -A c. A trajectory's reward counts at
its last decision.

Slots: advantage `gae` (1), which also provides `returns`; surrogate `ppo` (2); regularizer `value` (3).

Use it when rewards come along the trajectory, with one trajectory per start state, and in control: the critic tells the
decisions apart. Not for one verifiable reward per completion, where groups (`grpo`, `rloo`) give the baseline for free.

Pitfalls: advantages are poor until the critic has learned; watch the value loss. With many epochs the clip stops bounding
the policy, and what holds it is the learning rate. With gae_lambda below 1 credit for a late reward fades towards the start.
"""

from typing import Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import standardize, zero_outside
from polopt.functional.ratio import clipped_surrogate, dual_clipped, log_ratio
from polopt.functional.returns import generalized_advantages, outcome_at_last
from polopt.method import Method
from polopt.parts import Advantage, Regularizer, Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def clipped_value_loss(
    value: Float[Tensor, "N T"],
    old_value: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    clip: float | None,
) -> Float[Tensor, "N T"]:
    """Equation (3): half the squared error, pessimistic about steps beyond `clip` in reward units."""
    error = (value - returns).square()
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


@register("gae")
class GAE(Advantage):
    """Generalised advantage estimation with the actor's critic, equation (1)."""

    requires = frozenset({"old_value"})
    provides = frozenset({"returns"})

    class Config(Settings):
        """Options of the estimator."""

        gamma: float = Field(1.0, ge=0, le=1)
        """Discount per decision."""
        gae_lambda: float = Field(0.95, ge=0, le=1)
        """0: one-step advantages; 1: the whole return minus the value."""
        whiten: bool = True
        """Standardise the advantages over the batch."""

    def raw(self, batch: Batch) -> Float[Tensor, "N T"]:
        """Equation (1), in reward units."""
        rewards = outcome_at_last(batch.rewards.nan_to_num(0.0, 0.0, 0.0).sum(-1), batch.mask).to(
            batch.old_value
        )
        if batch.step_rewards is not None:
            rewards = rewards + zero_outside(batch.step_rewards, batch.mask).to(rewards)
        last = batch.old_value.new_zeros(len(batch)) if batch.last_value is None else batch.last_value
        if batch.terminated is not None:
            last = torch.where(batch.terminated, torch.zeros_like(last), last)
        return generalized_advantages(
            rewards, batch.old_value, last, batch.mask, self.config.gamma, self.config.gae_lambda
        )

    def forward(self, batch: Batch) -> Float[Tensor, "N T"]:
        advantages = self.raw(batch)
        return standardize(advantages, batch.mask) if self.config.whiten else advantages

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        return {"returns": self.raw(batch) + batch.old_value}


@register("ppo")
class PPOClip(Surrogate):
    """The clipped surrogate, equation (2)."""

    class Config(Surrogate.Config):
        """Options of the clipped surrogate."""

        clip_low: float = Field(0.2, ge=0, lt=1)
        """Ratios below 1 - clip_low are cut off where A < 0; 0.1 to 0.3."""
        clip_high: float = Field(0.2, ge=0)
        """Ratios above 1 + clip_high are cut off where A > 0; 0.2 to 0.3."""
        dual_clip: float | None = Field(None, gt=1)
        """Bound on ratio * |A| where A < 0; 3 to 10, None for none."""

        @model_validator(mode="after")
        def _dual_clip_beyond_clip(self) -> Self:
            if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
                raise ValueError(
                    f"dual_clip = {self.dual_clip} must be above 1 + clip_high = {1 + self.clip_high}"
                )
            return self

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        c = self.config
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        loss = clipped_surrogate(ratio, batch.advantages, c.clip_low, c.clip_high)
        return dual_clipped(loss, batch.advantages, c.dual_clip)

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        above = (ratio > 1 + self.config.clip_high) & (batch.advantages > 0)
        return above | (ratio < 1 - self.config.clip_low) & (batch.advantages < 0)


@register("value")
class ValueLoss(Regularizer):
    """The critic's loss, equation (3)."""

    requires = frozenset({"value", "old_value", "returns"})

    class Config(Regularizer.Config):
        """Options of the critic's loss."""

        coef: float = Field(0.5, ge=0)
        """Weight of the critic's loss."""
        clip: float | None = Field(None, gt=0)
        """Largest step of the value that is believed, in reward units; None for none."""

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return clipped_value_loss(
            evaluation.value, batch.old_value, batch.signal("returns"), self.config.clip
        )


@register_recipe("ppo")
def ppo() -> Method:
    """PPO with a critic: four passes over the data in four minibatches."""
    return Method(
        advantage=GAE(),
        surrogate=PPOClip(),
        regularizers=[ValueLoss()],
        defaults={"epochs": 4, "minibatches": 4},
    )


@register_recipe("ppo", domain="control")
def ppo_control() -> Method:
    """PPO with a critic on environments that live on: ten passes in 32 minibatches, discount 0.99."""
    return Method(
        advantage=GAE(gamma=0.99),
        surrogate=PPOClip(),
        regularizers=[ValueLoss()],
        defaults={"prompts": 8, "rollouts": 1, "epochs": 10, "minibatches": 32},
    )
