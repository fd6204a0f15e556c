"""Submodular grids (Prajapat et al., arXiv 2307.13372): the reward is what a cell adds to the cells visited before.

Actions: 0 stay, 1 right, 2 down, 3 left, 4 up; a move into a wall or the border stays. The start cell is visited already,
so the rewards of an episode add up to F(path) - F(start). `info["objective"]` is F(path so far), `info["gain"]` what the
last cell added to it.

    polopt/CoverageGrid-v0       height, width, footprint (small, large), weights (constant, bimodal, gp, or an array)
    polopt/TwoRooms-v0           7 x 14, two rooms joined by a corridor two rows wide, weight 1 everywhere
    polopt/ExperimentDesign-v0   height, width, lengthscale, noise_variance: information of a Gaussian process, in nats
    polopt/ItemCollection-v0     7 x 15, six types of items, each up to its demand; at most 21

and for all of them

    horizon        decisions of an episode (39, the official 40 states)
    start          number of the start cell, row-major
    reward         "marginal"; "modular" pays F({cell}) at every visit, the baseline of the paper
    action_noise   probability of a uniformly drawn action
    observation    "markov": row, column and time in [0, 1]; "index": number of the cell and time; "history": all cells so
                   far, by number, -1 for those to come
"""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from polopt.control.environments.problem import ProblemEnv, ProblemVectorEnv
from polopt.control.environments.submodular_grid import SubmodularGrid
from polopt.errors import ConfigError
from polopt.functional.submodular import (
    InformationGain,
    ItemCollection,
    WeightedCoverage,
    bimodal_weights,
    grid_footprint,
    grid_points,
    membership,
    squared_exponential,
)

ITEMS, DEMAND = (18, 14, 13, 16, 18, 14), (3, 2, 3, 4, 6, 3)


class CoverageGrid(SubmodularGrid):
    """Weighted coverage of a grid by the footprints of the cells visited.

    Args:
        height: rows.
        width: columns.
        footprint: "small" (2 x 2 cells) or "large" (3 x 3).
        weights: of the cells: "constant", "bimodal", "gp" (a drawn Gaussian process plus 3), or one for each cell.
        layout_seed: of the weights "gp".
        start: number of the start cell.
        **options: of `SubmodularGrid`.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        height: int = 30,
        width: int = 30,
        footprint: Literal["small", "large"] = "small",
        weights: str | Float[np.ndarray, " S"] = "constant",
        layout_seed: int = 0,
        start: int = 34,
        **options: Any,
    ) -> None:
        if footprint not in ("small", "large"):
            raise ConfigError(f"footprint = {footprint!r}: is not one of small, large")
        found = _weights(weights, height, width, layout_seed)
        function = WeightedCoverage(grid_footprint(height, width, footprint), found)
        super().__init__(function, (height, width), start, **options)


class TwoRooms(SubmodularGrid):
    """Coverage of two rooms of 7 x 4 cells, joined by a corridor two rows wide and six columns long.

    Args:
        start: number of the start cell, in the left room.
        **options: of `SubmodularGrid`.
    """

    def __init__(self, start: int = 0, **options: Any) -> None:
        walls = np.zeros((7, 14), dtype=bool)
        walls[[0, 1, 4, 5, 6], 4:10] = True
        function = WeightedCoverage(grid_footprint(7, 14), torch.from_numpy(~walls).double().flatten())
        super().__init__(function, (7, 14), start, walls=walls, **options)


class ExperimentDesign(SubmodularGrid):
    """Noisy measurements of a Gaussian process on the cells of the unit square.

    Args:
        height: rows.
        width: columns.
        lengthscale: of the squared-exponential covariance, in sides of the square.
        noise_variance: of a measurement; the process has variance 1.
        start: number of the start cell.
        horizon: decisions of an episode.
        **options: of `SubmodularGrid`.
    """

    def __init__(
        self,
        height: int = 10,
        width: int = 10,
        lengthscale: float = 0.2,
        noise_variance: float = 0.1,
        start: int = 0,
        horizon: int = 39,
        **options: Any,
    ) -> None:
        covariance = squared_exponential(grid_points(height, width), lengthscale)
        # a vector environment takes one more step before it begins anew
        function = InformationGain(covariance, noise_variance, capacity=horizon + 2)
        super().__init__(function, (height, width), start, horizon, **options)


class ItemCollectionGrid(SubmodularGrid):
    """Items of six types, (18, 14, 13, 16, 18, 14) of them with demands (3, 2, 3, 4, 6, 3), in distinct cells of 7 x 15.

    RECONSTRUCTED: where the items are; they are drawn once by `layout_seed`.

    Args:
        layout_seed: of the places of the items.
        start: number of the start cell.
        **options: of `SubmodularGrid`.
    """

    def __init__(self, layout_seed: int = 0, start: int = 0, **options: Any) -> None:
        cells = np.random.default_rng(layout_seed).permutation(7 * 15)[: sum(ITEMS)]
        groups = np.split(cells, np.cumsum(ITEMS)[:-1])
        locations = membership([torch.from_numpy(group) for group in groups], 7 * 15)
        super().__init__(ItemCollection(locations, torch.tensor(DEMAND)), (7, 15), start, **options)


def _weights(weights: str | np.ndarray, height: int, width: int, seed: int) -> torch.Tensor:
    if not isinstance(weights, str):
        found = torch.as_tensor(np.asarray(weights), dtype=torch.float64).flatten()
        if len(found) != height * width or not bool((found >= 0).all()):
            raise ConfigError(f"weights: must be {height * width} numbers, >= 0")
        return found
    if weights == "constant":
        return torch.ones(height * width, dtype=torch.float64)
    if weights == "bimodal":
        return bimodal_weights(height, width)
    if weights == "gp":
        covariance = squared_exponential(grid_points(height, width), 0.1)
        factor = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(len(covariance), dtype=torch.float64))
        normal = np.random.default_rng(seed).standard_normal(len(covariance))
        return (3 + factor @ torch.from_numpy(normal)).clamp(min=0)
    raise ConfigError(f"weights = {weights!r}: is not one of constant, bimodal, gp, nor an array")


class CoverageGridEnv(ProblemEnv):
    """`polopt/CoverageGrid-v0`."""

    problem_class = CoverageGrid


class CoverageGridVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/CoverageGrid-v0`."""

    problem_class = CoverageGrid


class TwoRoomsEnv(ProblemEnv):
    """`polopt/TwoRooms-v0`."""

    problem_class = TwoRooms


class TwoRoomsVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/TwoRooms-v0`."""

    problem_class = TwoRooms


class ExperimentDesignEnv(ProblemEnv):
    """`polopt/ExperimentDesign-v0`."""

    problem_class = ExperimentDesign


class ExperimentDesignVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/ExperimentDesign-v0`."""

    problem_class = ExperimentDesign


class ItemCollectionGridEnv(ProblemEnv):
    """`polopt/ItemCollection-v0`."""

    problem_class = ItemCollectionGrid


class ItemCollectionGridVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/ItemCollection-v0`."""

    problem_class = ItemCollectionGrid
