r"""RiskPO - Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training (arXiv 2510.00911, ICLR 2026).

Maximises a mixed value-at-risk of the reward: the lowest alpha-fraction counts (1 + omega) times, the middle up to the
beta-quantile once, everything above nothing. As 0/1 rewards are too coarse for quantiles, B prompts are bundled: bundle j
takes one answer of each, its score is the sum of their rewards, and its members share one advantage.

.. math::
    A(R) = -(1+\omega)(a - R)^+ + (R - a)^+ - (R - b)^+ + a - b, \quad a = F^{-1}(\alpha),\ b = F^{-1}(\beta) \tag{2}

.. math::
    q \leftarrow q + \gamma\big(s - \tfrac1J\textstyle\sum_j 1[R_j < q]\big), \quad s \in \{\alpha, \beta\} \tag{3}

.. math::
    L = -\frac1J\sum_j\frac1{B_j}\sum_{i \in j}\min\big(s_i A^{(j)}, \mathrm{clip}(s_i, 1-\epsilon, 1+\epsilon)A^{(j)}\big) \tag{4}

with s_i the length-normalised sequence ratio. The quantiles are initialised from the first batch and then tracked; an
iteration's advantages use the values before its own step. `form="code"` is the released implementation: scores compared
inside a set of bundles, tail and middle averaged with weights w_mix = 1 + omega and 1, optional division by their
deviation, and several ways to credit the members. It falls back to empirical quantiles of the set, as released. Its
`baseline="quantiles"` subtracts the middle's mean, by the trapezoid rule over 19 tracked quantiles (RECONSTRUCTED: with the
constant a - b where `natural_baseline` adds it).

Form `paper` has no positive advantage; `baseline="mean"` subtracts the batch mean. Answers beyond the smallest group of
a set join no bundle and have advantage 0.

Slots: shaping `bundle` (signals `bundle`, `bundle_set`), advantage `risk_po` with state, surrogate `bundle_clip`.

Use it when exploration should survive as accuracy rises and tasks have several right answers. Not where only one answer is
right: entropy then ends at 0 whatever the method.

Pitfalls: large bundles dilute credit (an answer pays for its neighbours), B = 1 loses the resolution: with few prompts an
iteration take a small B that divides their number. Form `paper` pushes every sampled answer down, under which the entropy
of small networks collapses: the recipe, unlike the paper, sets `baseline="mean"`, a constant. Deviations of scores go to 0
as they saturate, so do not divide by them late. The published tracker never carries its quantiles over; here they are
carried, as in the paper.
"""

from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.aggregation import aggregation_weights
from polopt.functional.groups import Groups
from polopt.functional.ratio import clipped_surrogate, sequence_log_ratio
from polopt.method import Method
from polopt.methods.advantage.risk_po_released import BASELINE_LEVELS, Credit, released_advantage
from polopt.parts import Advantage, Draw, Shaping, Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def bundles(
    group: Int[Tensor, " N"], size: int, draws: torch.Generator | None = None
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Bundle and bundle set of each trajectory.

    Args:
        group: group ids; consecutive groups in ascending order of their ids form a set.
        size: B, prompts of a bundle; a last set may hold fewer.
        draws: permutes the answers of each group; None keeps their order.

    Returns:
        bundle: [N], -1 for an answer beyond the smallest group of its set.
        bundle_set: [N].
    """
    groups = Groups.of(group)
    key = torch.arange(len(group)) if draws is None else torch.randperm(len(group), generator=draws)
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(groups.index[order], stable=True)]
    start = groups.size.cumsum(0) - groups.size
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group)) - start[groups.index[order]]
    bundle_set = groups.index // size
    of_group = torch.arange(len(groups.size)) // size
    count = int(of_group.max()) + 1 if len(of_group) else 0
    smallest = torch.full((count,), len(group)).scatter_reduce(0, of_group, groups.size, "amin")
    first = smallest.cumsum(0) - smallest
    return torch.where(place < smallest[bundle_set], first[bundle_set] + place, -1), bundle_set


def mixed_value_at_risk(
    scores: Float[Tensor, " J"], q_alpha: float | Tensor, q_beta: float | Tensor, omega: float
) -> Float[Tensor, " J"]:
    """Equation (2): slope 1 + omega below q_alpha, 1 up to q_beta, 0 beyond; at most 0."""
    return -(q_beta - scores).clamp(min=0) - omega * (q_alpha - scores).clamp(min=0)


def track(
    quantiles: Float[Tensor, " M"], levels: Float[Tensor, " M"], scores: Float[Tensor, " J"], step: float
) -> Float[Tensor, " M"]:
    """Equation (3): one step of each tracked quantile."""
    return quantiles + step * (levels - (scores[None] < quantiles[:, None]).double().mean(-1))


@register("bundle")
class Bundler(Shaping):
    """Bundles one answer of each of B prompts: signals `bundle` and `bundle_set`."""

    provides = frozenset({"bundle", "bundle_set"})

    class Config(Settings):
        """Options of the bundling."""

        size: int = Field(5, ge=1)
        """B, prompts of a bundle; 1 compares answers of one prompt only, 10 dilutes the credit."""

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        bundle, bundle_set = bundles(batch.group, self.config.size, draw("bundle"))
        batch = batch.clone(recurse=False)
        batch.set_signal("bundle", bundle)
        batch.set_signal("bundle_set", bundle_set)
        return batch


@register("risk_po")
class MixedValueAtRisk(Advantage):
    """Risk-averse advantage of bundles, equations (2) and (3), or the released form."""

    requires = frozenset({"bundle", "bundle_set"})
    quantiles: Tensor

    class Config(Settings):
        """Options of the risk measure."""

        form: Literal["paper", "code"] = "paper"
        """Equation (2) with tracked quantiles, or the released implementation."""
        alpha: float = Field(0.2, gt=0, lt=1)
        """Level of the tail."""
        beta: float = Field(0.8, gt=0, lt=1)
        """Level above which nothing counts."""
        omega: float = Field(0.5, ge=0)
        """Extra weight of the tail; the code form mixes with w_mix = 1 + omega."""
        tracking: float = Field(0.1, gt=0)
        """Step of the tracked quantiles, in reward units."""
        baseline: Literal["none", "mean", "quantiles"] = "none"
        """Subtract the mean of the advantages over the batch, or, in the code form, that of the middle over tracked quantiles."""
        credit: Credit = "std"
        """Code form: how a bundle's advantage is shared out."""
        natural_baseline: bool = True
        """Code form: add the constant a - b."""
        norm_by_std: bool = True
        """Code form: divide by the deviation of the set's scores."""

        @model_validator(mode="after")
        def _levels(self) -> Self:
            if self.alpha >= self.beta:
                raise ValueError(f"alpha = {self.alpha} must be below beta = {self.beta}")
            if self.baseline == "quantiles" and self.form != "code":
                raise ValueError('baseline = "quantiles": belongs to form = "code"; use "mean"')
            return self

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("quantiles", torch.full((len(self.levels),), torch.nan, dtype=torch.float64))

    @property
    def levels(self) -> Float[Tensor, " M"]:
        """alpha and beta, and those of the released baseline if it is used."""
        own = torch.tensor([self.config.alpha, self.config.beta], dtype=torch.float64)
        return torch.cat([own, BASELINE_LEVELS]) if self.config.baseline == "quantiles" else own

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        c, bundle = self.config, batch.signal("bundle")
        outcome = batch.outcome()
        inside, members, scores = self._scores(batch)
        first = bool(self.quantiles.isnan().any()) and len(scores) > 0
        quantiles = torch.quantile(scores, self.levels) if first else self.quantiles
        if c.form == "code":
            _, advantage = released_advantage(
                outcome, batch.group, bundle, batch.signal("bundle_set"), alpha=c.alpha, beta=c.beta, w_mix=1 + c.omega,
                credit=c.credit, natural_baseline=c.natural_baseline, norm_by_std=c.norm_by_std,
                baseline_quantiles=quantiles[2:] if c.baseline == "quantiles" else None,
            )  # fmt: skip
        else:
            a, b = quantiles
            advantage = torch.zeros_like(outcome)
            advantage[inside] = members.broadcast(mixed_value_at_risk(scores, a, b, c.omega))
        if c.baseline == "mean":
            mean = advantage[bundle >= 0].mean()
            advantage = torch.where(bundle >= 0, advantage - mean, advantage)
        return advantage[:, None]

    def observe(self, batch: Batch) -> None:
        scores = self._scores(batch)[2]
        if not len(scores):
            return
        if self.quantiles.isnan().any():
            self.quantiles.copy_(torch.quantile(scores, self.levels))
        else:
            self.quantiles.copy_(track(self.quantiles, self.levels, scores, self.config.tracking))

    def _scores(self, batch: Batch) -> tuple[Bool[Tensor, " N"], Groups, Float[Tensor, " J"]]:
        inside = batch.signal("bundle") >= 0
        members = Groups.of(batch.signal("bundle")[inside])
        return inside, members, members.sum(batch.outcome()[inside])


@register("bundle_clip")
class BundleClip(Surrogate):
    """Clipped sequence ratio, averaged inside each bundle and then over bundles, equation (4)."""

    coupling = "sequence"
    requires = frozenset({"bundle"})

    class Config(Settings):
        """Options of the clip."""

        clip_low: float = Field(0.2, ge=0, lt=1)
        """Width below 1 of the sequence ratio."""
        clip_high: float = Field(0.2, ge=0)
        """Width above 1 of the sequence ratio."""

    def loss_weights(self, batch: Batch) -> Float[Tensor, "N T"]:
        inside = batch.signal("bundle")[:, None] >= 0
        weights = torch.where(inside, batch.weights, torch.zeros_like(batch.weights))
        return aggregation_weights(batch.mask & inside, weights, batch.signal("bundle"), "group_mean")

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        ratio = (
            sequence_log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp().expand_as(evaluation.logp)
        )
        return clipped_surrogate(ratio, batch.advantages, self.config.clip_low, self.config.clip_high)


@register_recipe("risk_po")
def risk_po() -> Method:
    """RiskPO in the paper's form with bundles of five prompts, centred on the batch."""
    return Method(
        shaping=[Bundler()],
        advantage=MixedValueAtRisk(baseline="mean"),
        surrogate=BundleClip(),
        defaults={"minibatches": 2},
    )
