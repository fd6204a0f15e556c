r"""D3S - Dynamic Dual-Level Down-Sampling for Efficient Policy Optimization (arXiv 2509.22115, ICLR 2026).

Advantages are computed from all rollouts; then only those rollouts are kept whose advantages have the largest variance
over the batch, and of their tokens those with the largest |advantage| x entropy. How much is kept grows over training.

.. math::
    \hat S = \arg\max_{S \subset batch, |S| = N} \mathrm{Var}(A_S), \quad N = \min(N_s Q, |batch|) \tag{2}

.. math::
    s_{it} = |A_{it}| H_{it}, \quad k = \min(n, \max(1, \lceil K n\rceil)) \text{ tokens of the kept rollouts} \tag{4}

.. math::
    [N_s, K](p) = (1 - p)[N_{init}, K_{init}] + p[N_{final}, K_{final}] \tag{5}

The best set is always the a largest and the N - a smallest advantages (3). Scope "group" selects inside each group
(D3S-I). Advantages are never normalised again; rollouts that are dropped are not evaluated.

RECONSTRUCTED: the schedule's end points (N_s from a quarter of the group to all of it, K from 0.2 to 1), and that the
loss divides by the kept tokens (`denominator=selected` of the surrogate; `all` divides by all).

Slots: selection, after the advantage; needs `old_entropy`.

Use it when the update costs more than the rollouts and much of a batch is uninformative: it trains on a fraction of the
tokens. Not to gain per update with Adam, which removes the larger gradient again; the gain is per token.

Pitfalls: never normalise the advantages again after the selection, it would undo it; the update is biased relative to the
full group, on purpose. Without the schedule the gain is lost late in training. Token scores need the exact entropy.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Draw, Selection
from polopt.registry import register, register_recipe
from polopt.settings import Settings

TIE = 1e-12
"""Variances closer than this are equal."""


def most_varied(values: Float[Tensor, " N"], count: int) -> Bool[Tensor, " N"]:
    """Equation (3): the `count` values with the largest population variance, in O(N log N).

    Ties go to the most even split between the largest and the smallest values, then to more of the largest; equal values
    keep the order of their indices.
    """
    n = len(values)
    if count >= n:
        return torch.ones(n, dtype=torch.bool)
    order = torch.argsort(-values.double(), stable=True)
    ordered = values.double()[order]
    ordered = ordered - ordered.mean()
    zero = torch.zeros(1, dtype=torch.float64)
    sums, squares = torch.cat([zero, ordered.cumsum(0)]), torch.cat([zero, ordered.square().cumsum(0)])
    largest = torch.arange(count + 1)
    rest = n - (count - largest)
    mean = (sums[largest] + sums[n] - sums[rest]) / max(1, count)
    variance = (squares[largest] + squares[n] - squares[rest]) / max(1, count) - mean.square()
    tied = (variance >= variance.max() - TIE).nonzero()[:, 0]
    evenness = (tied.double() - count / 2).abs()
    a = int(tied[evenness == evenness.min()].max())
    kept = torch.zeros(n, dtype=torch.bool)
    kept[order[:a]] = True
    kept[order[n - (count - a) :]] = True
    return kept


def select_samples(
    advantages: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    per_group: int,
    scope: Literal["batch", "group"] = "batch",
) -> Bool[Tensor, " N"]:
    """Equation (2): which rollouts are kept, `per_group` per group on average (batch) or in each (group)."""
    groups = Groups.of(group)
    if scope == "batch":
        return most_varied(advantages, min(per_group * len(groups.size), len(advantages)))
    kept = torch.zeros(len(advantages), dtype=torch.bool)
    for number in range(len(groups.size)):
        rows = (groups.index == number).nonzero()[:, 0]
        kept[rows] = most_varied(advantages[rows], per_group)
    return kept


def select_tokens(
    advantages: Float[Tensor, "N #T"],
    entropy: Float[Tensor, "N T"],
    pool: Bool[Tensor, "N T"],
    keep_fraction: float,
) -> Bool[Tensor, "N T"]:
    """Equation (4): the tokens of the pool with the largest |A| H; ties go to the smaller row-major index."""
    size = int(pool.sum())
    if not size:
        return torch.zeros_like(pool)
    count = min(size, max(1, math.ceil(keep_fraction * size - 1e-9)))
    score = torch.where(pool, advantages.abs() * entropy, -torch.inf).flatten()
    kept = torch.zeros(pool.numel(), dtype=torch.bool)
    kept[torch.argsort(-score, stable=True)[:count]] = True
    return kept.view(pool.shape)


def schedule(
    progress: float, n_init: float, n_final: float, k_init: float, k_final: float
) -> tuple[int, float]:
    """Equation (5): rollouts per group, rounded half up, and share of the tokens, at a share of the run."""
    n = (1 - progress) * n_init + progress * n_final
    return math.floor(n + 0.5), (1 - progress) * k_init + progress * k_final


@register("d3s")
class DualLevelDownSampling(Selection):
    """Keeps the most varied rollouts and their most telling tokens, equations (2) to (5)."""

    requires = frozenset({"old_entropy"})
    reconstructed = "end points of the schedule; denominator of the loss"

    class Config(Settings):
        """Options of the down-sampling."""

        scope: Literal["batch", "group"] = "batch"
        """Compare rollouts over the batch, or inside each group."""
        n_init: float | None = Field(None, ge=1)
        """Rollouts kept per group at the start; a quarter of the mean group, at least 2, if not given."""
        n_final: float | None = Field(None, ge=1)
        """Rollouts kept per group at the end; the mean group if not given."""
        k_init: float = Field(0.2, gt=0, le=1)
        """Share of the tokens kept at the start."""
        k_final: float = Field(1.0, gt=0, le=1)
        """Share of the tokens kept at the end."""

    def forward(self, batch: Batch, draw: Draw) -> Float[Tensor, "N T"]:
        c, groups = self.config, Groups.of(batch.group)
        mean_size = len(batch) / max(1, len(groups.size))
        n_init = max(2.0, mean_size / 4) if c.n_init is None else c.n_init
        n_final = mean_size if c.n_final is None else c.n_final
        per_group, keep_fraction = schedule(self.progress, n_init, n_final, c.k_init, c.k_final)
        length = batch.lengths.clamp(min=1)
        kept = select_samples(batch.advantages.sum(-1) / length, batch.group, per_group, c.scope)
        tokens = select_tokens(batch.advantages, batch.old_entropy, batch.mask & kept[:, None], keep_fraction)
        return tokens.to(batch.old_logp)


@register_recipe("d3s")
def d3s() -> Method:
    """D3S over GRPO."""
    return Method(
        advantage=GroupStandardized(unbiased=False),
        selection=DualLevelDownSampling(),
        surrogate=PPOClip(denominator="selected"),
    )
