"""A walk on a grid that is paid for what it adds to a set function of the cells visited; `submodular.py` has the problems."""

from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int

from polopt.control.environments.problem import Outcome, Problem, State
from polopt.errors import ConfigError
from polopt.functional.submodular import SetFunction

REWARDS = ("marginal", "modular")
OBSERVATIONS = ("markov", "index", "history")


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
