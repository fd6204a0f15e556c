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
from gymnasium import spaces
from jaxtyping import Bool, Float, Int

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State
from polopt.errors import ConfigError
from polopt.functional.submodular import (
    InformationGain,
    ItemCollection,
    SetFunction,
    WeightedCoverage,
    bimodal_weights,
    grid_footprint,
    grid_points,
    membership,
    squared_exponential,
)

REWARDS = ("marginal", "modular")
OBSERVATIONS = ("markov", "index", "history")
ITEMS, DEMAND = (18, 14, 13, 16, 18, 14), (3, 2, 3, 4, 6, 3)


def grid_moves(
    height: int, width: int, walls: Bool[np.ndarray, "H W"] | None = None
) -> Int[np.ndarray, "S 5"]:
    """The cell that each action leads to from each cell."""
    free = np.ones((height, width), dtype=bool) if walls is None else ~walls
    row, column = (index.ravel() for index in np.indices((height, width)))
    here, moves = np.arange(height * width), []
    for down, right in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
        r, c = (row + down).clip(0, height - 1), (column + right).clip(0, width - 1)
        moves.append(np.where(free[r, c], r * width + c, here))
    return np.stack(moves, 1)


def greedy_walk(
    function: SetFunction, moves: Int[np.ndarray, "S A"], start: int, horizon: int
) -> tuple[Int[np.ndarray, " H+1"], float]:
    """The walk that always takes the largest gain (the first of equal ones), and its F."""
    actions = moves.shape[1]
    path, memory = [start], function.memory(1)
    total = float(function.add(memory, torch.tensor([start])))
    for _ in range(horizon):
        options = torch.from_numpy(moves[path[-1]])
        copies = {name: tensor.repeat_interleave(actions, 0) for name, tensor in memory.items()}
        best = int(function.add(copies, options).argmax())
        total += float(function.add(memory, options[best : best + 1]))
        path.append(int(options[best]))
    return np.array(path), total


class SubmodularGrid(Problem):
    """A walk on a grid that is paid for what it adds to a set function of the cells visited.

    Args:
        function: F.
        shape: rows and columns.
        start: number of the start cell.
        horizon: decisions of an episode.
        reward: "marginal" or "modular".
        action_noise: probability of a uniformly drawn action.
        observation: "markov", "index" or "history".
        walls: cells that cannot be entered.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        function: SetFunction,
        shape: tuple[int, int],
        start: int = 0,
        horizon: int = 39,
        reward: Literal["marginal", "modular"] = "marginal",
        action_noise: float = 0.0,
        observation: Literal["markov", "index", "history"] = "markov",
        walls: Bool[np.ndarray, "H W"] | None = None,
    ) -> None:
        sites = shape[0] * shape[1]
        if reward not in REWARDS:
            raise ConfigError(f"reward = {reward!r}: is not one of {', '.join(REWARDS)}")
        if observation not in OBSERVATIONS:
            raise ConfigError(f"observation = {observation!r}: is not one of {', '.join(OBSERVATIONS)}")
        if not 0 <= start < sites:
            raise ConfigError(f"start = {start}: must be a cell, 0 to {sites - 1}")
        self.function, self.shape, self.first, self.horizon = function, shape, start, horizon
        self.reward, self.action_noise, self.observation = reward, action_noise, observation
        self.moves = grid_moves(*shape, walls)
        self.modular = function.single_values(torch.arange(sites)).numpy()
        self.action_space = spaces.Discrete(5)
        self.observation_space = {
            "markov": spaces.Box(0.0, 1.0, (3,), np.float32),
            "index": spaces.MultiDiscrete([sites, horizon + 1]),
            "history": spaces.Box(-1.0, sites - 1.0, (horizon + 1,), np.float32),
        }[observation]

    def noise(self, generator: np.random.Generator) -> Float[np.ndarray, "H 2"]:
        return generator.random((self.horizon, 2))

    def start(self, noise: Float[np.ndarray, "N 0"]) -> State:
        count = len(noise)
        site = np.full(count, self.first)
        memory = self.function.memory(count)
        value = self.function.add(memory, torch.from_numpy(site)).numpy()
        path = np.full((count, self.horizon + 1), -1)
        path[:, 0] = self.first
        running = {f"memory/{name}": tensor.numpy() for name, tensor in memory.items()}
        return running | {"site": site, "value": value, "path": path}

    def observe(self, state: State) -> np.ndarray:
        site, time = state["site"], state["time"].clip(max=self.horizon)
        if self.observation == "history":
            return state["path"].astype(np.float32)
        if self.observation == "index":
            return np.stack([site, time], 1)
        row, column = np.divmod(site, self.shape[1])
        height, width = (max(n - 1, 1) for n in self.shape)
        return np.stack([row / height, column / width, time / self.horizon], 1).astype(np.float32)

    def move(self, state: State, actions: np.ndarray, noise: Float[np.ndarray, "N 2"]) -> Outcome:
        drawn = (noise[:, 1] * 5).astype(np.int64)
        actions = np.where(noise[:, 0] < self.action_noise, drawn, actions)
        site = self.moves[state["site"], actions]
        memory = {
            n[len("memory/") :]: torch.from_numpy(a) for n, a in state.items() if n.startswith("memory/")
        }
        gain = self.function.add(memory, torch.from_numpy(site)).numpy()
        state["site"], state["value"] = site, state["value"] + gain
        rows, step = np.arange(len(site)), (state["time"] + 1).clip(max=self.horizon)
        state["path"][rows, step] = site
        paid = gain if self.reward == "marginal" else self.modular[site]
        return Outcome(
            paid, np.zeros(len(site), dtype=bool), {"objective": state["value"].copy(), "gain": gain}
        )


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
