r"""REINFORCE - Simple Statistical Gradient-Following Algorithms for Connectionist RL (Williams, 1992).

The gradient of the expected reward is the reward, less a baseline, times the gradient of the log-probability of what
was done. There is no importance ratio: it is meant for data of the current policy.

.. math::
    A_i = R_i - b, \quad b \in \{0,\ \mathrm{mean}_j R_j,\ \bar R\} \tag{1}

.. math::
    L = -\frac1N \sum_i \sum_t A_{it} \log\pi_\theta(a_{it}|s_{it}) \tag{2}

The moving average :math:`\bar R` is that of earlier iterations, so it depends on nothing in this one; it is 0 in the
first. The batch's mean contains the trajectory's own reward, which shrinks the gradient by 1 - 1/N.

Slots: advantage `reinforce` (1) with state (the average), surrogate `reinforce` (2).

Use it as the plainest baseline and for unbiased gradients on fresh data. Not with several updates per rollout: there is no
ratio, and stale data are taken as fresh.

Pitfalls: one baseline for all prompts leaves the differences in difficulty in the gradient as noise: `rloo` has one for
each. The sum over a trajectory's decisions makes long trajectories count more.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.functional.masked import standardize
from polopt.method import Method
from polopt.parts import Advantage, Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings


@register("reinforce")
class RewardBaseline(Advantage):
    """Reward less a baseline that all prompts share, equation (1)."""

    class Config(Settings):
        """Options of the baseline."""

        baseline: Literal["none", "batch_mean", "moving_average"] = "batch_mean"
        """What is subtracted from the reward."""
        decay: float = Field(0.9, ge=0, lt=1)
        """Weight of the past in the moving average, per iteration."""
        whiten: bool = False
        """Standardise over the trajectories of the batch."""

    average: Tensor
    iterations: Tensor

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        advantages = batch.outcome()
        if self.config.baseline == "batch_mean":
            advantages = Groups.of(torch.zeros_like(batch.group)).centre(advantages)
        elif self.config.baseline == "moving_average":
            advantages = advantages - self.average
        if self.config.whiten:
            advantages = standardize(advantages, torch.ones_like(advantages, dtype=torch.bool))
        return advantages[:, None]

    def observe(self, batch: Batch) -> None:
        if not len(batch):
            return
        weight = 1 - self.config.decay if self.iterations > 0 else 1.0  # nothing is known before the first
        self.average.lerp_(batch.outcome().mean(), weight)
        self.iterations += 1


@register("reinforce")
class ScoreFunction(Surrogate):
    """The score-function estimator, equation (2), without a ratio: data of an older policy are taken as fresh."""

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return -batch.advantages * evaluation.logp


@register_recipe("reinforce")
def reinforce() -> Method:
    """REINFORCE with the batch's mean reward as baseline, one update per rollout."""
    return Method(advantage=RewardBaseline(), surrogate=ScoreFunction(aggregation="sequence_mean_token_sum"))
