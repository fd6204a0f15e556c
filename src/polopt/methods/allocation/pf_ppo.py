r"""PF-PPO - Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (arXiv 2409.06957, ICML 2025).

A reward model is reliable where it is very high or very low. Of a prompt's N responses, ranked by reward, PPO trains on
the best and a random other one (`br`), on best and worst (`bw`), or on the best (`bon`), as if they came from the
unfiltered policy.

.. math::
    w: \text{bon } w_{best} = 1; \quad \text{br } w_{best} = \tfrac12,\ w_{other} = \tfrac1{2(n-1)}; \quad
    \text{bw } w_{best} = w_{worst} = \tfrac12; \quad \text{none } \tfrac1n \tag{3}

.. math::
    \text{resample: } k \text{ draws from } w; \qquad
    \text{weight: } L = \frac1P\sum_g\sum_{i \in g} w_i \ell_i \tag{4, 5}

.. math::
    \text{pow: } w_i \propto |R_i|^k \text{ over the batch}; \quad
    \text{top: } R \ge a; \quad \text{top\_bottom: } R \ge a \text{ or } R \le b \tag{6}

Ranks are ascending and stable in the index. With 0/1 rewards ties are frequent: `skip_ties` drops prompts without
spread. No importance weights are added: the filter is deliberately biased. R^2 between reward and true score on filtered
samples (`r_squared`, bin rule RECONSTRUCTED) tells beforehand which filter to use.

Slots: selection, before the advantage by default (statistics then match the data trained on; `whiten="after"` selects
after it). The recipe is PPO with a critic and a KL in the reward.

Use it with a learned reward model that is trusted at its extremes only, and pick the filter by R^2 beforehand. Not with
exact rewards: there is no noise to filter, and best-of-N keeps no negative example at all.

Pitfalls: with rewards of 0 and 1 most ranks are ties: set `skip_ties=true`. `pow` wants rewards centred at 0. Selecting
after the advantages (`whiten="before"`) leaves a mean and about twice the variance. verl's `pf_ppo` takes the maximum over
the whole batch instead of the prompt.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import PoloptError
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.kl import KLReward
from polopt.methods.classics.ppo import GAE, PPOClip, ValueLoss
from polopt.parts import Draw, Selection
from polopt.registry import register, register_recipe
from polopt.settings import Settings

Strategy = Literal["br", "bw", "bon", "none", "pow", "top", "top_bottom"]


def places_in_groups(order: Int[Tensor, " N"], groups: Groups) -> Int[Tensor, " N"]:
    """Place of each sample among its group's, from 0, when the samples are gone through in this order."""
    order = order[torch.argsort(groups.index[order], stable=True)]
    start = groups.size.cumsum(0) - groups.size
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - start[groups.index[order]]
    return place


def ranks_in_groups(rewards: Float[Tensor, " N"], groups: Groups) -> Int[Tensor, " N"]:
    """Equation (2): place of each reward in its group, from 0, ascending, stable in the index."""
    return places_in_groups(torch.argsort(rewards.double(), stable=True), groups)


def filter_weights(
    rewards: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    strategy: Strategy,
    *,
    power: float = 2.0,
    high: float = 0.0,
    low: float = 0.0,
) -> Float[Tensor, " N"]:
    """Equations (3) and (6): probability of each sample in its group (`pow`: in the batch), float64.

    Args:
        rewards: [N]; centred in [-1, 1] for `pow`.
        group: group ids.
        strategy: which filter.
        power: exponent of `pow`; all rewards 0 gives uniform weights.
        high: `top` and `top_bottom` keep rewards from here on; a group without a kept sample has weights 0.
        low: `top_bottom` keeps rewards down from here.
    """
    groups = Groups.of(group)
    size, place = groups.broadcast(groups.size), ranks_in_groups(rewards, groups)
    best, worst = (place == size - 1).double(), (place == 0).double()
    even = 1 / size.double()
    alone = size == 1
    match strategy:
        case "none":
            return even
        case "bon":
            return best
        case "bw":
            return torch.where(alone, 1.0, (best + worst) / 2)
        case "br":
            return torch.where(alone, 1.0, torch.where(best > 0, 0.5, 0.5 / (size - 1).clamp(min=1)))
        case "pow":
            magnitude = rewards.double().abs()
            if not magnitude.any():
                return torch.full_like(magnitude, 1 / max(1, len(magnitude)))
            weight = (
                magnitude / magnitude.max()
            ) ** power  # whatever the power, the largest does not overflow
            return weight / weight.sum()
        case "top" | "top_bottom":
            kept = ((rewards >= high) | (rewards <= low) & (strategy == "top_bottom")).double()
            return kept / groups.broadcast(groups.sum(kept)).clamp(min=1)


def drawn_shares(
    weights: Float[Tensor, " N"], groups: Groups, draws: int, generator: torch.Generator
) -> Float[Tensor, " N"]:
    """Equation (4): share of each sample in `draws` draws from its group's weights, with replacement, float64.

    Shares of a group sum to 1, or are 0 if all its weights are.
    """
    if not len(weights):
        return weights.double()
    place = places_in_groups(torch.arange(len(weights)), groups)
    table = torch.zeros(len(groups.size), int(groups.size.max()), dtype=torch.float64)
    table[groups.index, place] = weights.double()
    some = table.sum(-1) > 0
    if bool(some.any()):
        chosen = torch.multinomial(table[some], draws, replacement=True, generator=generator)
        once = torch.ones_like(chosen, dtype=torch.float64)
        table[some] = torch.zeros_like(table[some]).scatter_add(1, chosen, once) / draws
    return table[groups.index, place]


class RSquared(NamedTuple):
    """How well rewards predict scores on filtered samples."""

    r2: Float[Tensor, ""]
    reward: Float[Tensor, " bins"]
    """Weighted mean reward of each bin."""
    score: Float[Tensor, " bins"]
    """Weighted mean score of each bin."""


def r_squared(
    rewards: Float[Tensor, " N"], scores: Float[Tensor, " N"], weights: Float[Tensor, " N"], bins: int = 0
) -> RSquared:
    """Equation (7): share of the scores' variance that the least-squares line over the rewards explains.

    Args:
        rewards: of each sample.
        scores: true score of each sample.
        weights: of the filter; samples of weight 0 are left out.
        bins: consecutive chunks of equal count in the order of the rewards, whose weighted means are the points; 0 takes
            every sample as a point.

    Returns:
        r2 is 0 for constant rewards and NaN for constant scores, where it is undefined.

    Raises:
        PoloptError: 1 or 2 bins, which explain everything.
    """
    if bins in (1, 2):
        raise PoloptError(
            f"bins = {bins}: a line through two points explains everything; use 0 or at least 3"
        )
    kept = weights > 0
    rewards, scores, weights = rewards[kept].double(), scores[kept].double(), weights[kept].double()
    if bins:
        chunks = torch.argsort(rewards, stable=True).tensor_split(bins)
        share = [weights[c] / weights[c].sum() for c in chunks if len(c)]
        means = [
            torch.stack([w @ v[c] for w, c in zip(share, chunks, strict=False)]) for v in (rewards, scores)
        ]
        rewards, scores = means
    x, y = rewards - rewards.mean(), scores - scores.mean()
    if not bool(y.square().sum() > 0):
        r2 = torch.tensor(torch.nan, dtype=torch.float64)
    elif not bool(x.square().sum() > 0):
        r2 = torch.zeros((), dtype=torch.float64)
    else:
        r2 = (x @ y).square() / (x.square().sum() * y.square().sum())
    return RSquared(r2, rewards, scores)


@register("pf_ppo")
class PolicyFiltration(Selection):
    """Trains on rank-filtered samples, equations (2) to (6)."""

    reconstructed = "bin rule of the R^2 diagnostic"

    class Config(Settings):
        """Options of the filter."""

        strategy: Strategy = "bw"
        """Which samples: best and random, best and worst, best, all, by |reward|, by thresholds."""
        mode: Literal["weight", "resample"] = "weight"
        """Weight the samples, or draw from the weights."""
        draws: int | None = Field(None, ge=1)
        """Draws per group of `resample`; 2, or 1 for `bon`, if not given."""
        whiten: Literal["after", "before"] = "after"
        """Advantages are computed and whitened after filtering, on what is kept, or before it."""
        power: float = Field(2.0, ge=0)
        """Exponent of `pow`."""
        high: float = 0.0
        """Threshold from which `top` and `top_bottom` keep, in reward units."""
        low: float = 0.0
        """Threshold down to which `top_bottom` keeps, in reward units."""
        skip_ties: bool = False
        """Drop prompts whose rewards are all equal."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.before_advantage = self.config.whiten == "after"

    def forward(self, batch: Batch, draw: Draw) -> Float[Tensor, "N 1"]:
        c, groups = self.config, Groups.of(batch.group)
        outcome = batch.rewards.double().nan_to_num(0.0).sum(-1)  # ranks know nothing of the KL in the reward
        weights = filter_weights(outcome, batch.group, c.strategy, power=c.power, high=c.high, low=c.low)
        if c.skip_ties:
            spread = groups.max(outcome) > groups.min(outcome)
            weights = torch.where(groups.broadcast(spread), weights, 0.0)
        whole = c.strategy == "pow"  # one distribution over the batch instead of one for each group
        if whole:
            weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        draws = (c.draws or (1 if c.strategy == "bon" else 2)) * (len(groups.size) if whole else 1)
        if c.mode == "resample":
            scope = Groups.of(torch.zeros_like(batch.group)) if whole else groups
            weights = drawn_shares(weights, scope, draws, draw("pf_ppo"))
        return (weights * groups.broadcast(groups.size) * (len(groups.size) if whole else 1))[:, None]


@register_recipe("pf_ppo")
def pf_ppo() -> Method:
    """PF-PPO, best and worst of each prompt, with a critic and a KL of 0.01 in the reward."""
    return Method(
        shaping=[KLReward(coef=0.01)],
        advantage=GAE(),
        selection=PolicyFiltration(),
        surrogate=PPOClip(aggregation="group_mean"),
        regularizers=[ValueLoss()],
        defaults={"rollouts": 5, "epochs": 3},
    )
