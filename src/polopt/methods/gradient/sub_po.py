r"""SubPO - Submodular Reinforcement Learning (Prajapat, Mutny, Zeilinger, Krause, arXiv 2307.13372, 2023).

Rewards with diminishing returns (coverage, information, items to collect) belong to the whole trajectory, not to single
states. The reward of a decision is then the marginal gain of the state it leads to; the gains add up to the objective, so
the policy gradient stays unbiased, and the credit of each decision is that of the greedy algorithm.

.. math::
    \Delta_j = F(\tau_{0:j+1}) - F(\tau_{0:j}), \quad \sum_j \Delta_j = F(\tau) - F(\{s_0\}) \tag{1}

.. math::
    W_i = \sum_{j \ge i} \kappa^{j-i} \Delta_j m_j, \quad A_i = W_i - b_i \tag{2}

.. math::
    L = -\frac1N \sum_n \sum_i m_{ni} A_{ni} \log\pi_\theta(a_{ni}|\cdot) \tag{3}

With :math:`\kappa = 1` (2) is exact, with :math:`\kappa = 0` it is greedy and may be trapped behind corridors without any
gain. The baseline is the mean of :math:`W_i` over the trajectories that have a decision i. The authors' tabular script
weighs a decision by the value of the path so far, :math:`F(\tau_{0:i+1})`, instead: in expectation the same as
:math:`\kappa = 0`, at a larger variance (`credit=prefix_value`). An entropy bonus may fade as 1 / (iteration + 1).

Gains are the environment's step rewards, a method sees no states: `polopt/CoverageGrid-v0`, `polopt/ExperimentDesign-v0`
and others give them, or with `reward="modular"` the reward that counts every visit, for comparison. Set functions are in
`polopt.functional.submodular`. With a modular F this is REINFORCE. Any other estimator works on the gains. The authors'
choice for continuous tasks is a critic with generalised advantages, the recipe `subpo-gae` for control, for example on
`polopt/PointCoverage-v0` (report F then, not the discounted sum); it is `subpo` with `--advantage gae:gamma=0.99,whiten=false
--regularizer value:coef=1`.

Slots: advantage `subpo` (2), surrogate `reinforce` (3), regularizer `fading_entropy` (optional).

Use it when repeated visits are worth less than first ones: coverage, measurements, collecting. Not when rewards add up,
where it changes nothing.

Pitfalls: a Markov policy needs the time among its inputs, or it cannot cover. The running value F as a reward counts every
cell again at every step. A discount below 1 no longer adds up to F.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import zero_outside
from polopt.functional.returns import discounted_sums, outcome_at_last
from polopt.method import Method
from polopt.methods.classics.ppo import GAE, ValueLoss
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.parts import Advantage, Regularizer
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def gains_to_go(
    gains: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], discount: float = 1.0
) -> Float[Tensor, "N T"]:
    """W of equation (2), float64, 0 outside the mask. A masked step adds nothing but takes its time."""
    return zero_outside(discounted_sums(zero_outside(gains.double(), mask), discount), mask)


def prefix_weights(
    gains: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], start_value: float = 0.0
) -> Float[Tensor, "N T"]:
    """F(path up to the next state), float64, 0 outside the mask: the weights of the authors' script.

    `start_value` is F(start). Being the same for all trajectories, it changes the variance alone.
    """
    return zero_outside(start_value + zero_outside(gains.double(), mask).cumsum(1), mask)


def step_means(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, " T"]:
    """Mean at each step over the trajectories that have it; exactly their value where all are equal."""
    low = torch.where(mask, values, torch.inf).amin(0) if len(values) else values.new_zeros(values.shape[1])
    low = torch.where(mask.any(0), low, 0.0)
    return low + zero_outside(values - low, mask).sum(0) / mask.sum(0).clamp(min=1)


@register("subpo")
class GainsToGo(Advantage):
    """Marginal gains to come less the mean at the step, equation (2). Rewards of trajectories count at the last decision."""

    class Config(Settings):
        """Options of the estimator."""

        discount: float = Field(1.0, ge=0, le=1)
        """Weight kappa of a gain one decision later: 1 exact, 0 greedy."""
        baseline: Literal["none", "step_mean"] = "step_mean"
        """What is subtracted: nothing, or the batch's mean at the same step."""
        credit: Literal["gain_to_go", "prefix_value"] = "gain_to_go"
        """Equation (2), or the value of the path so far (the authors' tabular script)."""
        start_value: float = Field(0.0, ge=0)
        """F of the start state, part of the value of the path so far; it matters without a baseline."""
        scale: float = Field(1.0, gt=0)
        """What gains are divided by; the authors' script: 2(T + 2) for footprints of four cells and T decisions."""

    def forward(self, batch: Batch) -> Float[Tensor, "N T"]:
        c = self.config
        gains = outcome_at_last(batch.rewards.double().nan_to_num(0.0, 0.0, 0.0).sum(-1), batch.mask)
        if batch.step_rewards is not None:
            gains = gains + zero_outside(batch.step_rewards.double(), batch.mask)
        if c.credit == "gain_to_go":
            weights = gains_to_go(gains / c.scale, batch.mask, c.discount)
        else:
            weights = prefix_weights(gains / c.scale, batch.mask, c.start_value / c.scale)
        if c.baseline == "step_mean":
            weights = weights - step_means(weights, batch.mask)
        return zero_outside(weights, batch.mask)


@register("fading_entropy")
class FadingEntropy(Regularizer):
    """Pays coef / (iteration + 1) reward units for each nat of entropy, averaged like the surrogate's loss."""

    requires = frozenset({"entropy"})
    iterations: Tensor

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return -evaluation.entropy / (self.iterations + 1)

    def observe(self, batch: Batch) -> None:
        self.iterations += 1


@register_recipe("subpo")
def subpo() -> Method:
    """SubPO: exact gains to go with step means as baseline, one update per rollout."""
    return Method(advantage=GainsToGo(), surrogate=ScoreFunction(aggregation="sequence_mean_token_sum"))


@register_recipe("subpo-gae", domain="control")
def subpo_gae() -> Method:
    """SubPO with a critic, for continuous tasks: generalised advantages of the gains, one update per rollout."""
    return Method(
        advantage=GAE(gamma=0.99, whiten=False),
        surrogate=ScoreFunction(aggregation="sequence_mean_token_sum"),
        regularizers=[ValueLoss(coef=1.0)],
        defaults={"prompts": 15, "rollouts": 1},
    )
