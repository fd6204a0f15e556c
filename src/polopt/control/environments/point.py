r"""A point that should reach a target through nonlinear drift (after arXiv 2302.01734).

.. math::
    x_0 \sim N(0, I), \quad x' = x + (0.3 \sin x_2, 0) + 0.4 a, \quad r = \exp(-\|x' - (1, -0.5)\|^2 / 2)

20 decisions; rewards are bounded, so the return is at most 20. Observation: x.

    polopt/Point-v0    horizon: decisions of an episode
"""

import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State

TARGET = np.array([1.0, -0.5])


class Point(Problem):
    """A point in the plane.

    Args:
        horizon: decisions of an episode.
    """

    def __init__(self, horizon: int = 20) -> None:
        self.horizon = horizon
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " 2"]:
        return generator.standard_normal(2)

    def start(self, noise: Float[np.ndarray, "N 2"]) -> State:
        return {"x": noise.copy()}

    def observe(self, state: State) -> np.ndarray:
        return state["x"].astype(np.float32)

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        x = state["x"] + 0.4 * actions
        x[:, 0] += 0.3 * np.sin(state["x"][:, 1])
        state["x"] = x
        reward = np.exp(-((x - TARGET) ** 2).sum(-1) / 2)
        return Outcome(reward, np.zeros(len(reward), dtype=bool))


class PointEnv(ProblemEnv):
    """`polopt/Point-v0`."""

    problem_class = Point


class PointVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/Point-v0`."""

    problem_class = Point
