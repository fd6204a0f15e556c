r"""DAPO - Decoupled Clip and Dynamic Sampling Policy Optimization (Yu et al., arXiv 2503.14476, 2025).

GRPO with four changes: the clip leaves more room above (clip-higher), prompts whose rollouts all earn the same are
drawn anew (dynamic sampling), every decision of the batch weighs the same (token-level loss), and an answer that
comes near the length limit is punished softly (overlong shaping). No KL.

.. math::
    L = \frac1{\sum_i L_i} \sum_i\sum_t
        \max(-A_i r_{it}, -A_i\,\mathrm{clip}(r_{it}, 1-\epsilon_l, 1+\epsilon_h)), \quad
    \min_g R < \max_g R \tag{8, 11}

.. math::
    R^{length}_i = \min\Big(0, \max\Big(-1, \frac{(L_{max} - L_{cache}) - L_i}{L_{cache}}\Big)\Big) \tag{13}

A prompt counts as solved or unsolved by the rewards as they were measured, before any shaping. The paper makes 16
updates per rollout of 512 prompts; the recipe makes 4.

Slots: sampler `dapo`, shaping `overlong`; the advantage is GRPO's, the surrogate PPO's.

Use it when a large share of prompts is solved always or never and rollouts are cheap. Not where rollouts dominate the
cost: prompts drawn anew are rollouts thrown away, so compare by rollouts and not by iterations.

Pitfalls: `overlong` must know the real length limit (`--shaping overlong:max_length=512,cache=128`); at its default of
20480 it never acts on short completions. What is missing after `rounds` rounds stays missing, and the batch is smaller.
"""

from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Draw, Sampler, Shaping
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def mixed_groups(
    outcome: Float[Tensor, " N"], group: Int[Tensor, " N"], known: Bool[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """Whether the known rewards of a trajectory's group differ; False in a group of one."""
    groups = Groups.of(group)
    high = groups.max(torch.where(known, outcome, -torch.inf))
    low = groups.min(torch.where(known, outcome, torch.inf))
    return groups.broadcast(high > low)


def overlong_punishment(lengths: Int[Tensor, " N"], max_length: int, cache: int) -> Float[Tensor, " N"]:
    """Equation (13): 0 up to `max_length - cache` decisions, then down to -1 at `max_length`; float64."""
    return ((max_length - cache - lengths.double()) / cache).clamp(-1, 0)


@register("dapo")
class DynamicSampling(Sampler):
    """Draws further prompts for those whose rollouts all earned the same."""

    class Config(Settings):
        """Options of dynamic sampling."""

        rounds: int = Field(8, ge=1)
        """Most rollout rounds of an iteration; what is missing then stays missing."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.max_rounds = self.config.rounds

    def accepts(self, batch: Batch) -> Bool[Tensor, " N"]:
        return mixed_groups(batch.outcome(), batch.group, batch.rewards.isfinite().any(-1))


@register("overlong")
class OverlongPunishment(Shaping):
    """The soft punishment of long trajectories, equation (13), as one more reward."""

    class Config(Settings):
        """Where long begins."""

        max_length: int = Field(20480, ge=1)
        """Decisions at which the punishment is whole; the length limit, or somewhat less (paper: 20480)."""
        cache: int = Field(4096, ge=1)
        """Decisions over which it sets in (paper: 4096)."""
        coef: float = Field(1.0, ge=0)
        """Reward units of the whole punishment (paper: 1)."""

        @model_validator(mode="after")
        def _begins_inside(self) -> Self:
            if self.cache > self.max_length:
                raise ValueError(f"cache = {self.cache} must be at most max_length = {self.max_length}")
            return self

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        c = self.config
        punishment = c.coef * overlong_punishment(batch.lengths, c.max_length, c.cache)
        batch = batch.clone(recurse=False)
        batch.rewards = torch.cat([batch.rewards, punishment[:, None].to(batch.rewards)], 1)
        return batch


@register_recipe("dapo")
def dapo() -> Method:
    """DAPO with the paper's clip and lengths, four updates per rollout."""
    return Method(
        sampler=DynamicSampling(),
        shaping=[OverlongPunishment()],
        advantage=GroupStandardized(),
        surrogate=PPOClip(clip_low=0.2, clip_high=0.28),
        defaults={"minibatches": 4},
    )
