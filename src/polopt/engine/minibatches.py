"""Cutting an iteration's batch into minibatches."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from polopt.domain import Actor
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.trainer_config import TrainerConfig


def cuts_decisions(actor: Actor, method: Method) -> bool:
    """Minibatches are of decisions, not of trajectories: neither the policy nor the loss needs them together."""
    return actor.independent_decisions and method.decision_wise


def usual_rows(actor: Actor, method: Method, config: TrainerConfig) -> int | None:
    """Rows of every minibatch, where they are known before there are any and are the same."""
    if method.off_policy:
        return config.batch_size
    decisions = config.prompts * config.rollouts * getattr(actor, "steps_per_rollout", 0)
    rows, odd = divmod(decisions, config.minibatches)
    return rows if rows and not odd and cuts_decisions(actor, method) else None


def minibatches(
    group: Int[Tensor, " N"], count: int, keep_groups: bool, draws: torch.Generator
) -> Iterator[Int[Tensor, " n"]]:
    """The rows of `count` minibatches of nearly equal size, in random order, together all rows once.

    Args:
        group: group ids.
        count: minibatches; fewer where there are fewer rows (or groups, if they are kept whole).
        keep_groups: give whole groups to a minibatch.
        draws: randomness of the order.
    """
    if count == 1:
        yield torch.arange(len(group))
        return
    if not keep_groups:
        order = torch.randperm(len(group), generator=draws)
        yield from (rows for rows in order.tensor_split(count) if len(rows))
        return
    groups = Groups.of(group)
    position = torch.randperm(len(groups.size), generator=draws)
    minibatch_of_group = position * min(count, len(position)) // len(position)
    for number in range(min(count, len(position))):
        yield (minibatch_of_group[groups.index] == number).nonzero()[:, 0]
