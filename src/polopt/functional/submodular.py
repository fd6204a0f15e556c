r"""Monotone submodular functions of the sites that a trajectory visits, and their marginal gains.

A set function has F(empty) = 0 and diminishing returns: :math:`F(X \cup s) - F(X) \ge F(Y \cup s) - F(Y)` for
:math:`X \subseteq Y`. What a running set needs is kept in a *memory*, tensors [N, ...] by name, so that the gain of a site
costs no pass over the trajectory. Site -1 is no site: it adds nothing. Everything is computed in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Memory = dict[str, Tensor]
"""What is known of the N running sets, updated in place."""


class SetFunction(ABC):
    """A monotone submodular function of a set of sites."""

    @abstractmethod
    def memory(self, count: int) -> Memory:
        """The memory of `count` empty sets."""

    @abstractmethod
    def add(self, memory: Memory, sites: Shaped[Tensor, " N *k"]) -> Float[Tensor, " N"]:
        """Add a site to each set, in place; the marginal gains."""

    def single_values(self, sites: Shaped[Tensor, " N *k"]) -> Float[Tensor, " N"]:
        """F({s}) of each site: what a modular reward pays at every visit."""
        return self.add(self.memory(len(sites)), sites)

    def prefix_values(self, paths: Shaped[Tensor, "N L *k"]) -> Float[Tensor, "N L"]:
        """F of the first 1, 2, ..., L sites of each path."""
        memory = self.memory(len(paths))
        gains = [self.add(memory, paths[:, step]) for step in range(paths.shape[1])]
        return torch.stack(gains, 1).cumsum(1) if gains else torch.zeros(len(paths), 0, dtype=torch.float64)

    def values(self, paths: Shaped[Tensor, "N L *k"]) -> Float[Tensor, " N"]:
        """F of all sites of each path."""
        return self.prefix_values(paths)[:, -1]


def marginal_gains(prefix_values: Float[Tensor, "N L"]) -> Float[Tensor, "N L-1"]:
    """What each site after the first adds to F."""
    return prefix_values.diff(dim=1)


class WeightedCoverage(SetFunction):
    r"""Total weight of the covered items: :math:`F(S) = \sum_{i \in \cup_{s \in S} C(s)} \omega_i`.

    Args:
        covers: which items each site covers, [S, I]; see `grid_footprint`.
        weights: of the items, >= 0; 1 if None.
    """

    def __init__(self, covers: Bool[Tensor, "S I"], weights: Float[Tensor, " I"] | None = None) -> None:
        self.covers = covers.bool()
        items = covers.shape[1]
        self.weights = torch.ones(items, dtype=torch.float64) if weights is None else weights.double()

    def memory(self, count: int) -> Memory:
        return {"covered": torch.zeros(count, self.covers.shape[1], dtype=torch.bool)}

    def add(self, memory: Memory, sites: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        fresh = self.covers[sites.clamp(min=0)] & ~memory["covered"] & (sites >= 0)[:, None]
        memory["covered"] |= fresh
        return fresh.double() @ self.weights


class ItemCollection(SetFunction):
    r"""Items of several types, each up to its demand: :math:`F(S) = \sum_k \min(|S \cap G_k|, d_k)`.

    Args:
        locations: where the items of each type are, [K, S].
        demand: how many of each type count.
    """

    def __init__(self, locations: Bool[Tensor, "K S"], demand: Int[Tensor, " K"]) -> None:
        self.locations, self.demand = locations.bool(), demand.double()

    def memory(self, count: int) -> Memory:
        types, sites = self.locations.shape
        return {
            "seen": torch.zeros(count, sites, dtype=torch.bool),
            "collected": torch.zeros(count, types, dtype=torch.float64),
        }

    def add(self, memory: Memory, sites: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        fresh = _visit(memory["seen"], sites)
        before = memory["collected"].minimum(self.demand).sum(-1)
        memory["collected"] += (self.locations[:, sites.clamp(min=0)].T & fresh[:, None]).double()
        return memory["collected"].minimum(self.demand).sum(-1) - before


class InformationGain(SetFunction):
    r"""Nats that noisy measurements at the distinct sites tell of a Gaussian process (Bayesian D-design).

    .. math::
        F(S) = \tfrac12 \log\det(I + K_{SS} / \sigma^2)

    The memory holds the directions that earlier measurements took out of the prior covariance: a gain costs O(n S) after
    n measurements.

    Args:
        covariance: prior covariance K of the S sites.
        noise_variance: of a measurement, > 0.
        capacity: most distinct sites of a running set; S if None.
    """

    def __init__(
        self, covariance: Float[Tensor, "S S"], noise_variance: float, capacity: int | None = None
    ) -> None:
        self.covariance, self.noise_variance = covariance.double(), float(noise_variance)
        self.capacity = len(covariance) if capacity is None else min(capacity, len(covariance))

    def memory(self, count: int) -> Memory:
        sites = len(self.covariance)
        return {
            "seen": torch.zeros(count, sites, dtype=torch.bool),
            "directions": torch.zeros(count, self.capacity, sites, dtype=torch.float64),
            "variance": self.covariance.diagonal().repeat(count, 1),
        }

    def add(self, memory: Memory, sites: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        measured = memory["seen"].sum(-1)
        fresh = _visit(memory["seen"], sites)
        rows, at = torch.arange(len(sites)), sites.clamp(min=0)
        variance = memory["variance"][rows, at].clamp(min=0)
        taken = memory["directions"][:, : int(measured.max()) if len(sites) else 0]
        explained = torch.einsum("nk,nks->ns", taken[rows, :, at], taken)
        scale = (variance + self.noise_variance).rsqrt() * fresh
        direction = (self.covariance[at] - explained) * scale[:, None]
        memory["directions"][rows[fresh], measured[fresh]] = direction[fresh]
        memory["variance"] -= direction.square()
        return torch.log1p(variance / self.noise_variance) * fresh / 2

    def prefix_values(self, paths: Int[Tensor, "N L"]) -> Float[Tensor, "N L"]:
        earlier = torch.ones(paths.shape[1], paths.shape[1]).tril(-1).bool()
        fresh = ~((paths[:, :, None] == paths[:, None, :]) & earlier).any(-1) & (paths >= 0)
        at = paths.clamp(min=0)
        covariance = self.covariance[at[:, :, None], at[:, None, :]] / self.noise_variance
        covariance = torch.where(fresh[:, :, None] & fresh[:, None, :], covariance, 0.0)
        factor = torch.linalg.cholesky(covariance + torch.eye(paths.shape[1], dtype=torch.float64))
        return factor.diagonal(dim1=-2, dim2=-1).log().cumsum(-1)


class GridMaskCoverage(SetFunction):
    """Area seen by a body at continuous positions: cells of a square block at each position, divided by `unit`.

    Args:
        half_width: the mask covers [-half_width, half_width] squared.
        cells: of the mask along each side.
        block: cells of the block along each side; it starts in the cell of the position.
        unit: cells that make one reward unit.
    """

    def __init__(
        self, half_width: float = 20.0, cells: int = 100, block: int = 5, unit: float = 10.0
    ) -> None:
        self.half_width, self.cells, self.block, self.unit = half_width, cells, block, unit

    def memory(self, count: int) -> Memory:
        return {"covered": torch.zeros(count, self.cells, self.cells, dtype=torch.bool)}

    def add(self, memory: Memory, sites: Float[Tensor, "N 2"]) -> Float[Tensor, " N"]:
        width = 2 * self.half_width / self.cells
        first = ((sites.double() + self.half_width) / width).floor()[:, :, None]
        cell = torch.arange(self.cells)
        inside = (cell >= first) & (cell < first + self.block)
        fresh = inside[:, 0, :, None] & inside[:, 1, None, :] & ~memory["covered"]
        memory["covered"] |= fresh
        return fresh.sum((1, 2)).double() / self.unit


def membership(members: Sequence[Sequence[int] | Tensor], size: int) -> Bool[Tensor, "K size"]:
    """Lists of indices below `size` as rows of booleans.

    Example:
        >>> membership([[0, 2], []], 3).tolist()
        [[True, False, True], [False, False, False]]
    """
    table = torch.zeros(len(members), size, dtype=torch.bool)
    for row, indices in zip(table, members, strict=True):
        row[torch.as_tensor(indices, dtype=torch.int64)] = True
    return table


def grid_footprint(height: int, width: int, size: Literal["small", "large"] = "small") -> Bool[Tensor, "S S"]:
    """Cells that each cell of a grid (row-major) covers, cut at the border.

    "small": itself, its right, lower and lower-right neighbour; "large": the footprints of these.
    """
    row, column = (torch.arange(n) for n in (height, width))
    rows = (row[:, None] == row) | (row[:, None] + 1 == row)
    columns = (column[:, None] == column) | (column[:, None] + 1 == column)
    small = torch.einsum("ac,bd->abcd", rows.double(), columns.double()).reshape(height * width, -1)
    return (small if size == "small" else small @ small) > 0


def bimodal_weights(height: int, width: int) -> Float[Tensor, " S"]:
    """1 / (1 + exp(-x y)) with x and y linearly spaced over [-1, 1]: two opposite corners weigh more."""
    x, y = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
    return (x[:, None] * y).sigmoid().flatten()


def grid_points(height: int, width: int) -> Float[Tensor, "S 2"]:
    """Coordinates of the cells in [0, 1] squared, row-major."""
    x, y = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (height, width))
    return torch.cartesian_prod(x, y)


def squared_exponential(points: Float[Tensor, "S k"], lengthscale: float) -> Float[Tensor, "S S"]:
    """Covariance exp(-|x - x'|^2 / (2 lengthscale^2)) of a Gaussian process."""
    return torch.exp(-torch.cdist(points, points).square() / (2 * lengthscale**2))


def _visit(seen: Bool[Tensor, "N S"], sites: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Mark the sites as seen, in place; which were not."""
    rows, at = torch.arange(len(sites)), sites.clamp(min=0)
    fresh = ~seen[rows, at] & (sites >= 0)
    seen[rows[fresh], at[fresh]] = True
    return fresh
