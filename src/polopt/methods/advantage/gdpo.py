r"""GDPO - Group reward-Decoupled Normalization Policy Optimization (arXiv 2601.05242, 2026).

Every reward is standardised on its own inside the prompt's group, the standardised values are added with weights, and
the sum is standardised once over the batch: combinations of rewards that GRPO on the sum cannot tell apart keep their
own advantages, and the scale does not grow with the number of rewards.

.. math::
    A^{(k)}_i = \frac{R_{ik} - \mu_{gk}}{\sigma_{gk} + \epsilon_g}, \quad A_i = \sum_k w_k A^{(k)}_i \tag{2, 3}

.. math::
    \hat A_i = \frac{A_i - \mathrm{mean}_j A_j}{\mathrm{std}_j A_j + \epsilon_b} \tag{4}

.. math::
    \hat A_{it} = \frac{A_i - \mu}{\sqrt{v + \epsilon_b}}, \quad
    \mu, v \text{ over all valid tokens, } v \text{ unbiased} \tag{5}

Standard deviations are unbiased. Level "sequence" is (4), the paper's; level "token" is (5), the verl variant, where
long samples weigh more and epsilon_b is in the variance. One reward alone: (2), which is GRPO. A reward that does not
apply (NaN) counts 0 before (2) with `nan_policy="zero"` (official), or is left out of its statistics with "ignore".
A group of one has 0 but enters the batch statistics.

Conditioned reward: an easy reward counts only where a hard one reaches a threshold, :math:`R_{il} \leftarrow R_{il}
1[R_{ik} \ge t]` (7).

Slots: advantage `gdpo`; shaping `conditioned` (7). Weights express priority, not units. Keep a KL in the loss: in the
reward it would be standardised away.

Use it when several rewards of different scale and difficulty are added, such as format, correctness and length. With one
reward it is GRPO: not worth it there.

Pitfalls: a reward that is nearly but not quite constant is blown up to unit variance: round it. An easy reward that
outruns a hard one is better gated by it (`conditioned`) than weighted down. TRL's and verl's epsilons differ: one is added
to the deviation, the other to the variance.

Not the generalised DPO nor the graph diffusion method, which share the name.
"""

from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import ConfigError
from polopt.functional.groups import Groups
from polopt.functional.masked import zero_outside
from polopt.method import Method
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Advantage, Draw, Shaping
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def decoupled_sum(
    rewards: Float[Tensor, "N K"],
    group: Int[Tensor, " N"],
    weights: Float[Tensor, " K"],
    eps: float = 1e-4,
    nan_policy: Literal["zero", "ignore"] = "zero",
) -> Float[Tensor, " N"]:
    """Equations (2) and (3): standardised inside the group reward by reward, then added; float64."""
    if nan_policy == "zero":
        groups = Groups.of(group)
        values = rewards.double().nan_to_num(nan=0.0)
        return (groups.centre(values) / (groups.broadcast(groups.std(values)) + eps)) @ weights.double()
    total = torch.zeros(len(rewards), dtype=torch.float64)
    for column, weight in zip(rewards.double().unbind(-1), weights.double(), strict=True):
        applies = ~column.isnan()
        groups = Groups.of(group[applies])
        values = column[applies]
        total[applies] += weight * groups.centre(values) / (groups.broadcast(groups.std(values)) + eps)
    return total


def batch_standardized(values: Float[Tensor, " N"], eps: float = 1e-4) -> Float[Tensor, " N"]:
    """Equation (4); 0 for fewer than two values."""
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + eps)


def token_standardized(
    values: Float[Tensor, " N"], mask: Bool[Tensor, "N T"], eps: float = 1e-8
) -> Float[Tensor, "N T"]:
    """Equation (5): every valid token counts once in the statistics."""
    count = mask.sum()
    if count < 2:
        return torch.zeros(mask.shape, dtype=values.dtype)
    spread = zero_outside(values[:, None].expand(mask.shape), mask)
    centred = zero_outside(spread - spread.sum() / count, mask)
    return centred / (centred.square().sum() / (count - 1) + eps).sqrt()


def conditioned(
    rewards: Float[Tensor, "N K"], easy: int, hard: int, threshold: float
) -> Float[Tensor, "N K"]:
    """Equation (7): the reward in column `easy` counts only where column `hard` reaches the threshold."""
    gated = rewards.clone()
    gated[:, easy] = torch.where(
        rewards[:, hard] >= threshold, rewards[:, easy], torch.zeros_like(rewards[:, easy])
    )
    return gated


@register("gdpo")
class DecoupledNormalized(Advantage):
    """Reward-decoupled advantage, equations (2) to (5)."""

    class Config(Settings):
        """Options of the decoupled normalisation."""

        weights: tuple[float, ...] | None = None
        """Priority of each reward; all 1 if not given."""
        level: Literal["sequence", "token"] = "sequence"
        """Batch step over trajectories (paper) or over tokens (verl variant)."""
        eps_group: float = Field(1e-4, gt=0)
        """Added to the group's standard deviation."""
        eps_batch: float = Field(1e-4, gt=0)
        """Added to the batch's standard deviation, or with level "token" to its variance."""
        nan_policy: Literal["zero", "ignore"] = "zero"
        """What a reward that does not apply counts as."""

    def forward(self, batch: Batch) -> Float[Tensor, "N #T"]:
        c, count = self.config, batch.rewards.shape[1]
        if c.weights is not None and len(c.weights) != count:
            raise ConfigError(f"advantage gdpo.weights: {len(c.weights)} weights for {count} rewards")
        weights = torch.ones(count) if c.weights is None else torch.tensor(c.weights)
        total = decoupled_sum(batch.rewards, batch.group, weights, c.eps_group, c.nan_policy)
        if count == 1:
            return total[:, None]
        if c.level == "token":
            return token_standardized(total, batch.mask, c.eps_batch)
        return batch_standardized(total, c.eps_batch)[:, None]


@register("conditioned")
class ConditionedReward(Shaping):
    """An easy reward that counts only where a hard one succeeds, equation (7)."""

    class Config(Settings):
        """Which reward is gated by which."""

        easy: int = Field(ge=0)
        """Column of the gated reward."""
        hard: int = Field(ge=0)
        """Column of the gating reward."""
        threshold: float = 1.0
        """Value that the gating reward must reach, in its own units."""

        @model_validator(mode="after")
        def _two_rewards(self) -> Self:
            if self.easy == self.hard:
                raise ValueError(f"easy and hard are both column {self.easy}; name two rewards")
            return self

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        c = self.config
        if max(c.easy, c.hard) >= batch.rewards.shape[1]:
            raise ConfigError(
                f"shaping conditioned: columns {c.easy} and {c.hard} of {batch.rewards.shape[1]} rewards"
            )
        batch = batch.clone(recurse=False)
        batch.rewards = conditioned(batch.rewards, c.easy, c.hard, c.threshold)
        return batch


@register_recipe("gdpo")
def gdpo() -> Method:
    """GDPO over GRPO's surrogate, sequence level."""
    return Method(advantage=DecoupledNormalized(), surrogate=PPOClip(aggregation="sequence_mean"))
