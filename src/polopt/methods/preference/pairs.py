"""Pairs of trajectories of one group, and their averages: what the pairwise losses share."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Pairs(NamedTuple):
    """All unordered pairs inside groups."""

    first: Int[Tensor, " M"]
    second: Int[Tensor, " M"]
    weight: Float[Tensor, " M"]
    """Mean over the pairs of a group, then over groups with at least two members."""
    members: Int[Tensor, " M"]
    """Size of the pair's group."""


def pairs_in_groups(group: Int[Tensor, " N"], counted: Bool[Tensor, " N"]) -> Pairs:
    """The pairs of counted rows with equal group ids.

    Memory grows with the squared size of the groups, not of the batch.
    """
    rows = counted.nonzero()[:, 0]
    _, index, size = torch.unique(group[rows], return_inverse=True, return_counts=True)
    rows = rows[torch.argsort(index, stable=True)]
    members = size.repeat_interleave(size)
    start = (size.cumsum(0) - size).repeat_interleave(size)
    earlier = torch.arange(len(rows)) - start  # members of its group before each row, each a pair with it
    second = torch.arange(len(rows)).repeat_interleave(earlier)
    first = torch.arange(len(second)) - (earlier.cumsum(0) - earlier)[second] + start[second]
    plural = (size > 1).sum().clamp(min=1)
    weight = 2 / (members * (members - 1).clamp(min=1) * plural).double()
    return Pairs(rows[first], rows[second], weight[second], members[second])
