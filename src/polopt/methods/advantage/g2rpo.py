r"""G2RPO - Gaussian GRPO with length and entropy shaping (OpenVLThinkerV2, arXiv 2604.08539, 2026).

Instead of a z-score, the one-dimensional optimal-transport map to N(0, 1): a reward is replaced by the normal quantile of
its rank, ties share the average of theirs. First inside each prompt's group, then inside each task, so that sparse, dense
and heavy-tailed rewards of a mixed batch weigh alike and no outlier dominates.

.. math::
    q_i = \Phi^{-1}\Big(\frac{i - 0.5}{n}\Big), \quad
    z = \mathrm{OT}(r)_{\text{group}}, \quad A = \mathrm{OT}(z)_{\text{task}} \tag{1, 2, 3}

.. math::
    \text{several rewards: } A = \mathrm{OT}\Big(\textstyle\sum_k z^{(k)}\Big)_{\text{task}} \tag{4}

.. math::
    \mathrm{env}(\ell) = 0 \ (\ell < a, \ell > d),\ \tfrac{\ell-a}{b-a} \ (a \le \ell < b),\ 1 \ (b \le \ell \le c),\
    1 - \tfrac{\ell-c}{d-c} \ (c < \ell \le d) \tag{6}

.. math::
    L_H = c_H \sum_\tau \big[\max(0, H_\tau - H_{hi}) + \max(0, H_{lo} - H_\tau)\big] \tag{7}

Scores are computed in float64 with a tie tolerance, since the second stage would otherwise rank rounding noise. (7) with
the released estimator (`sampled`, minus log-probability of the drawn token) has no expected gradient on policy; `full`
uses the exact entropy and does control it. Tasks without tokens in a minibatch are skipped. The knots of (6) are not
published: they are the user's. Equal rewards of a group give 0 in the first stage; keep the accuracy filter, which looks
at the first reward alone, the correctness.

Slots: advantage `g2rpo`, shaping `length_envelope`, regularizer `entropy_band`, sampler `accuracy_filter`; reads `task`.

Use it when a run mixes tasks whose rewards differ in scale, sparsity or tails (`--task A+B` gives the task ids). With one
task and rewards of 0 and 1 it is nearly GRPO: not worth it there.

Pitfalls: ranks forget magnitudes, 0.81 against 0.83 is as strong as 0 against 1: round noisy dense rewards or raise
`tie_tol`. Never rank raw rewards across prompts. Lengths are decisions here, characters in the released code.
"""

from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.functional.masked import zero_outside
from polopt.method import Method
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Advantage, Draw, Regularizer, Sampler, Shaping
from polopt.registry import register, register_recipe
from polopt.settings import Settings

NOISE = 1e-12
"""Scores up to this size are 0."""


def normal_scores(values: Float[Tensor, " N"], groups: Groups, tie_tol: float = 1e-9) -> Float[Tensor, " N"]:
    """Equation (1) inside each group: the normal quantile of each value's rank, float64; 0 in a group of one.

    Args:
        values: any scale.
        groups: whose ranks are taken apart.
        tie_tol: neighbouring values closer than this are tied.
    """
    order = torch.argsort(values.double(), stable=True)
    order = order[torch.argsort(groups.index[order], stable=True)]
    index, ordered = groups.index[order], values.double()[order]
    rank = torch.arange(len(values)) - (groups.size.cumsum(0) - groups.size)[index]
    level = (rank.double() + 0.5) / groups.size[index]
    quantile = torch.special.ndtri(level)
    fresh = torch.ones(len(values), dtype=torch.bool)
    fresh[1:] = (index[1:] != index[:-1]) | (ordered[1:] - ordered[:-1] > tie_tol)
    ties = Groups.of(fresh.cumsum(0))
    scores = torch.empty_like(ordered)
    scores[order] = ties.broadcast(ties.sum(quantile) / ties.size)
    return torch.where(scores.abs() < NOISE, 0.0, scores)


def gaussian_rank_advantage(
    rewards: Float[Tensor, "N K"], group: Int[Tensor, " N"], task: Int[Tensor, " N"], tie_tol: float = 1e-9
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Equations (2) to (4): the sum of the group-stage scores over the rewards, and the advantage.

    NaN rewards, which do not apply, score 0 in the first stage.
    """
    first = torch.zeros(len(rewards), dtype=torch.float64)
    for column in rewards.double().unbind(-1):
        applies = ~column.isnan()
        first[applies] += normal_scores(column[applies], Groups.of(group[applies]), tie_tol)
    return first, normal_scores(first, Groups.of(task), tie_tol)


def length_envelope(
    length: Float[Tensor, " N"], min_start: float, peak_start: float, peak_end: float, max_end: float
) -> Float[Tensor, " N"]:
    """Equation (6): trapezoid over the length in decisions, in [0, 1]; an empty ramp is a step."""
    rise = (
        (length - min_start) / (peak_start - min_start) if peak_start > min_start else torch.ones_like(length)
    )
    fall = 1 - (length - peak_end) / (max_end - peak_end) if max_end > peak_end else torch.ones_like(length)
    inside = (length >= min_start) & (length <= max_end)
    height = torch.where(
        length < peak_start, rise, torch.where(length > peak_end, fall, torch.ones_like(length))
    )
    return torch.where(inside, height, torch.zeros_like(length))


def task_entropy(
    entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], task: Int[Tensor, " N"]
) -> Float[Tensor, " tasks"]:
    """Mean entropy of each task that has decisions, in nats per decision, in ascending order of their ids."""
    index = torch.unique(task, return_inverse=True)[1]
    count = int(index.max()) + 1 if len(task) else 0
    total = torch.zeros(count, dtype=entropy.dtype).index_add(0, index, zero_outside(entropy, mask).sum(-1))
    decisions = torch.zeros(count, dtype=entropy.dtype).index_add(0, index, mask.sum(-1).to(entropy))
    return total[decisions > 0] / decisions[decisions > 0]


def entropy_band(mean_entropy: Float[Tensor, " tasks"], low: float, high: float) -> Float[Tensor, ""]:
    """Equation (7) without its coefficient: how far each task's mean entropy lies outside [low, high], in nats."""
    return ((mean_entropy - high).clamp(min=0) + (low - mean_entropy).clamp(min=0)).sum()


@register("g2rpo")
class GaussianRank(Advantage):
    """Normal scores inside the group and then inside the task, equations (1) to (4)."""

    requires = frozenset({"task"})

    class Config(Settings):
        """Options of the ranking."""

        tie_tol: float = Field(1e-9, ge=0)
        """Rewards closer than this are tied; raise it for noisy rewards."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        return gaussian_rank_advantage(batch.rewards, batch.group, batch.task, self.config.tie_tol)[1][
            :, None
        ]


@register("length_envelope")
class LengthEnvelope(Shaping):
    """Adds a reward for the length of the completion, equation (6)."""

    class Config(Settings):
        """Knots of the trapezoid in decisions, and its weight."""

        min_start: float = Field(ge=0)
        """Shorter gets nothing."""
        peak_start: float = Field(ge=0)
        """From here on the full reward."""
        peak_end: float = Field(ge=0)
        """Up to here the full reward."""
        max_end: float = Field(ge=0)
        """Longer gets nothing."""
        weight: float = Field(0.1, ge=0)
        """Factor on the length reward."""

        @model_validator(mode="after")
        def _ascending(self) -> Self:
            if not self.min_start <= self.peak_start <= self.peak_end <= self.max_end:
                raise ValueError("min_start <= peak_start <= peak_end <= max_end must hold")
            return self

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        c = self.config
        score = length_envelope(batch.lengths.double(), c.min_start, c.peak_start, c.peak_end, c.max_end)
        batch = batch.clone(recurse=False)
        batch.rewards = torch.cat([batch.rewards, c.weight * score[:, None].to(batch.rewards)], -1)
        return batch


@register("entropy_band")
class TaskEntropyBand(Regularizer):
    """Keeps the mean entropy of each task inside a band, equation (7)."""

    separable = False
    requires = frozenset({"task", "entropy"})

    class Config(Regularizer.Config):
        """Options of the band."""

        coef: float = Field(0.02, ge=0)
        """Weight of the penalty; 0.02 to 0.1."""
        low: float = Field(0.2, ge=0)
        """Lower edge in nats per decision."""
        high: float = Field(0.6, ge=0)
        """Upper edge in nats per decision; 0.4 to 0.6."""
        estimator: Literal["sampled", "full"] = "full"
        """Exact entropy, or minus the log-probability of the drawn token as released."""

        @model_validator(mode="after")
        def _band(self) -> Self:
            if self.low > self.high:
                raise ValueError(f"low = {self.low} must not exceed high = {self.high}")
            return self

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        c = self.config
        entropy = -evaluation.logp if c.estimator == "sampled" else evaluation.entropy
        selected = batch.mask & (batch.loss_weight != 0)
        return c.coef * entropy_band(task_entropy(entropy, selected, batch.task), c.low, c.high)


@register("accuracy_filter")
class AccuracyFilter(Sampler):
    """Keeps groups whose accuracy, the mean of the first reward, lies in a range; draws prompts anew for the others."""

    domains = frozenset({"language", "miniature"})

    class Config(Settings):
        """Options of the filter."""

        low: float = 0.01
        """Smallest accuracy of a kept group."""
        high: float = 0.99
        """Largest accuracy of a kept group."""
        max_rounds: int = Field(20, ge=1)
        """Rollout rounds until the batch is full."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.max_rounds = self.config.max_rounds

    def accepts(self, batch: Batch) -> Bool[Tensor, " N"]:
        groups, known = Groups.of(batch.group), batch.rewards[:, 0].isfinite()
        right = zero_outside(batch.rewards[:, 0].double(), known)
        mean = groups.broadcast(
            groups.sum(right) / groups.sum(known.double())
        )  # NaN, which no range holds, if unknown
        return (mean >= self.config.low) & (mean <= self.config.high)


@register_recipe("g2rpo")
def g2rpo() -> Method:
    """G2RPO with the released clip; no length or entropy shaping, as in the released configuration."""
    return Method(
        sampler=AccuracyFilter(),
        advantage=GaussianRank(),
        surrogate=PPOClip(clip_high=0.3, dual_clip=3),
        defaults={"minibatches": 4},
    )
