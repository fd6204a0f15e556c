"""Statistics inside groups of trajectories: ragged, vectorised, safe at large offsets, exact for constant groups.

Values are shifted by the group's minimum before any sum is taken, so equal values give deviations of exactly 0 and a
large common offset costs no digits. Everything is computed in float64 and returned in it: it is [N], never [N, T].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The groups of a batch, numbered 0..P-1 in ascending order of their ids."""

    index: Int[Tensor, " N"]
    """Which group each trajectory belongs to."""
    size: Int[Tensor, " P"]
    """Trajectories of each group."""

    @classmethod
    def of(cls, group: Int[Tensor, " N"]) -> "Groups":
        """From group ids, in any order and with gaps."""
        _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
        return cls(index, size)

    def sum(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "P *k"]:
        """Sum of each group, float64."""
        total = values.new_zeros(len(self.size), *values.shape[1:], dtype=torch.float64)
        return total.index_add_(0, self.index, values.double())

    def min(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "P *k"]:
        """Minimum of each group, float64."""
        return self._reduce(values, "amin")

    def max(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "P *k"]:
        """Maximum of each group, float64."""
        return self._reduce(values, "amax")

    def mean(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "P *k"]:
        """Mean of each group, float64; exactly the common value of a constant group."""
        low = self.min(values)
        return low + self._mean_above(values, low)

    def centre(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "N *k"]:
        """Deviation of each value from its group's mean, float64; exactly 0 in a constant group."""
        low = self.min(values)
        return (values.double() - low[self.index]) - self._mean_above(values, low)[self.index]

    def std(self, values: Float[Tensor, "N *k"], unbiased: bool = True) -> Float[Tensor, "P *k"]:
        """Standard deviation of each group, float64; 0 for a group of one."""
        squares = self.sum(self.centre(values).square())
        return (squares / self._column((self.size - int(unbiased)).clamp(min=1), squares)).sqrt()

    def leave_one_out(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "N *k"]:
        """Deviation from the mean of the group's other members, float64; exactly 0 in a constant group."""
        size = self._column(self.size, values)[self.index]
        return self.centre(values) * size / (size - 1).clamp(min=1)

    def leave_one_out_mean(self, values: Float[Tensor, "N *k"]) -> Float[Tensor, "N *k"]:
        """Mean of the other members of the group, float64; the value itself in a group of one."""
        return values.double() - self.leave_one_out(values)

    def broadcast(self, per_group: Tensor) -> Tensor:
        """A quantity of each group [P, ...], given to its members [N, ...]."""
        return per_group[self.index]

    def _mean_above(self, values: Tensor, low: Tensor) -> Tensor:
        above = self.sum(values.double() - low[self.index])
        return above / self._column(self.size, above)

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        index = self.index.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
        start = values.new_zeros(len(self.size), *values.shape[1:], dtype=torch.float64)
        return start.scatter_reduce_(0, index, values.double(), how, include_self=False)

    @staticmethod
    def _column(per_group: Tensor, like: Tensor) -> Tensor:
        return per_group.view(-1, *(1,) * (like.dim() - 1))
