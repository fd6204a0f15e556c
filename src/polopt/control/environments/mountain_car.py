r"""Mountain car (Moore, 1990), as in Bayesian actor-critic (Ghavamzadeh et al., JMLR 17(66), 2016).

A car too weak for the hill must swing up to reach x = 0.5:

.. math::
    v' = \mathrm{clip}(v + 0.001 a - 0.0025\cos 3x,\ \pm 0.07), \quad x' = \mathrm{clip}(x + v',\ -1.2,\ 0.5), \quad
    a \in \{-1, +1\}

At the left end it stops. Every decision costs 1; an episode is cut after 200. Gymnasium's `MountainCar-v0` has a third
action and a wider road.

RECONSTRUCTED: where an episode starts is not in the released domain file that was read: here anywhere on the road at any
speed, evenly (`start="uniform"`), or at rest in the valley at x = -0.5 (`start="valley"`).

    polopt/MountainCar-v0    start, horizon: decisions after which an episode is cut

Actions: 0 back, 1 forward. Observation: position and velocity, each scaled to [0, 1].
"""

from typing import Literal

import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State
from polopt.errors import ConfigError

ROAD, SPEED = (-1.2, 0.5), 0.07
"""Ends of the road, the right one the goal; largest velocity."""
POWER, GRAVITY = 0.001, 0.0025
CENTRES = 4
"""Features of the paper's policy: Gaussians at the midpoints of as many cells each way, ..."""
WIDTH = 1.3 / CENTRES
"""... and their standard deviation, in units of the observation."""


def gaussian_features(observation: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 16"]:
    """The features of the paper's policy: 4 x 4 Gaussians in the scaled state."""
    midpoints = (np.arange(CENTRES) + 0.5) / CENTRES
    centres = np.stack(np.meshgrid(midpoints, midpoints, indexing="ij"), -1).reshape(-1, 2)
    distance = observation[..., None, :] - centres
    return np.exp(-np.square(distance).sum(-1) / (2 * WIDTH**2))


class MountainCar(Problem):
    """A car in a valley.

    Args:
        start: "uniform" or "valley".
        horizon: decisions after which an episode is cut.

    Raises:
        ConfigError: another start.
    """

    ends_at_horizon = False

    def __init__(self, start: Literal["uniform", "valley"] = "uniform", horizon: int = 200) -> None:
        if start not in ("uniform", "valley"):
            raise ConfigError(f"start = {start!r}: is not one of uniform, valley")
        self.first, self.horizon = start, horizon
        self.action_space = spaces.Discrete(2)
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " 2"]:
        return generator.random(2)

    def start(self, noise: Float[np.ndarray, "N 2"]) -> State:
        if self.first == "valley":
            return {"position": np.full(len(noise), -0.5), "velocity": np.zeros(len(noise))}
        low, high = ROAD
        return {"position": low + (high - low) * noise[:, 0], "velocity": SPEED * (2 * noise[:, 1] - 1)}

    def observe(self, state: State) -> Float[np.ndarray, "N 2"]:
        low, high = ROAD
        scaled = [(state["position"] - low) / (high - low), (state["velocity"] / SPEED + 1) / 2]
        return np.stack(scaled, 1).astype(np.float32)

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        low, high = ROAD
        push = POWER * (2 * actions - 1) - GRAVITY * np.cos(3 * state["position"])
        velocity = (state["velocity"] + push).clip(-SPEED, SPEED)
        position = (state["position"] + velocity).clip(low, high)
        state["velocity"] = np.where(position <= low, np.maximum(velocity, 0.0), velocity)
        state["position"] = position
        return Outcome(np.full(len(position), -1.0), position >= high)


class MountainCarEnv(ProblemEnv):
    """`polopt/MountainCar-v0`."""

    problem_class = MountainCar


class MountainCarVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/MountainCar-v0`."""

    problem_class = MountainCar
