"""What a domain gives to the trainer: a `Task` that measures outcomes and an `Actor` that acts and evaluates.

These are protocols: a domain's classes need not inherit from them, but may, for what has a default.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation


@dataclass(frozen=True)
class Plan:
    """Which rollouts to make: `counts[i]` from prompt or start state `prompt_ids[i]`.

    The whole iteration's randomness is drawn for all its rollouts, so that they do not depend on how many ranks share
    them: this plan's are the `sum(counts)` from number `first` on, of `total`.
    """

    prompt_ids: Int[Tensor, " P"]
    counts: Int[Tensor, " P"]
    heldout: bool = False
    """From the held-out split, with the evaluation's way of acting instead of the training's."""
    first: int = 0
    total: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.total < 0:
            object.__setattr__(self, "total", int(self.counts.sum()))

    def part(self, rank: int, world: int) -> "Plan":
        """The share of one rank: whole prompts, as evenly as their counts allow."""
        border = (self.counts.cumsum(0) - 1) * world // max(1, self.total)
        mine = border == rank
        before = int(self.counts[border < rank].sum())
        return Plan(self.prompt_ids[mine], self.counts[mine], self.heldout, self.first + before, self.total)


@dataclass(frozen=True)
class Rollout:
    """What came of a plan."""

    batch: Batch
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Sums over this rank's work: seconds by stage (`time/...`), counts of faults."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """A few trajectories a person can read."""


class Task(Protocol):
    """Where prompts or start states come from and how outcomes are measured."""

    name: str
    reward_names: tuple[str, ...]
    train_size: int
    heldout_size: int

    def state_dict(self) -> dict[str, Any]:
        """What it must remember to go on after an interrupt, beyond what counters give."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        return

    def close(self) -> None:
        """Release whatever the task holds."""
        ...


class Actor(Protocol):
    """A policy in its domain."""

    domain: str
    provides: frozenset[str]
    """Evaluation fields it can compute and optional batch fields its rollouts carry."""
    exact_sampler: bool
    """The rollout's log-probabilities are those of `evaluate` up to float error of the same precision."""

    own_rollouts: bool
    """Its rollouts are its own; false: stored ones, of a policy that is unknown."""
    independent_decisions: bool
    """Given the payload, `evaluate` sees each decision alone, so that a row may hold any one of them."""

    @property
    def module(self) -> nn.Module:
        """Everything that is trained or saved."""
        ...

    def rollout(self, task: Any, plan: Plan, generator: torch.Generator) -> Rollout:
        """Act. Draws come from `generator` alone, for all `plan.total` rollouts in order."""
        ...

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current policy's view of the batch's decisions."""
        ...

    def micro_batches(self, batch: Batch) -> list[Int[Tensor, " n"]]:
        """The batch's rows in pieces that fit into memory."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside it, `evaluate` is the reference policy's."""
        ...

    def observe(self, batch: Batch) -> dict[str, float]:
        """Called once an iteration, after its updates, with the whole batch as it was collected.

        The place where running statistics are updated; returns what the domain reports of the batch.
        """
        ...

    def score(self, task: Any, batch: Batch) -> dict[str, float]:
        """Statistics of held-out rollouts; `score`, `score/low` and `score/high` (95 % interval) among them."""
        ...


class ReplayActor(Actor, Protocol):
    """A policy that off-policy methods train on decisions from a replay buffer."""

    horizon: int
    """Decisions of each of its rollouts."""

    def redraw(self, batch: Batch, draws: torch.Generator) -> Batch:
        """The decisions with the noise by which `evaluate` draws new ones in their place."""
        ...

    def after_step(self, **options: Any) -> None:
        """Called after each optimizer step, with the options for `evaluate`: target networks follow."""
        ...
