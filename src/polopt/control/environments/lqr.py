r"""The linear-quadratic regulator of Bayesian policy gradients (Ghavamzadeh et al., JMLR 17(66), 2016), gradient known.

.. math::
    x_0 \sim N(0.3, 0.001^2), \quad x' = x + a + N(0, 0.01^2), \quad r = -(x^2 + 0.1 a^2), \quad 20\ \text{decisions}

The policy is a ~ N(gain x, sd^2). With :math:`m_t = E[x_t^2]` everything is in closed form:
:math:`m_{t+1} = (1 + \lambda)^2 m_t + \sigma^2 + 0.01^2`. At sd 0.001 the best gain is -0.916, at a cost of 0.10034.

    polopt/LQR-v0    horizon: decisions of an episode
"""

import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State

START_MEAN, START_SD, NOISE_SD, ACTION_COST = 0.3, 0.001, 0.01, 0.1


def lqr_return(gain: float, sd: float, horizon: int = 20) -> float:
    """Expected return of the policy a ~ N(gain x, sd squared)."""
    square, total = START_MEAN**2 + START_SD**2, 0.0
    for _ in range(horizon):
        total -= square + ACTION_COST * (gain**2 * square + sd**2)
        square = (1 + gain) ** 2 * square + sd**2 + NOISE_SD**2
    return total


def true_gradient(gain: float, sd: float, horizon: int = 20) -> Float[np.ndarray, " 2"]:
    """Gradient of the expected return with respect to (gain, sd).

    Example:
        >>> true_gradient(-0.2, 1.0).round(1).tolist()
        [-178.3, -100.1]
    """
    square, by, total = START_MEAN**2 + START_SD**2, np.zeros(2), np.zeros(2)
    for _ in range(horizon):
        own = np.array([2 * gain * square, 2 * sd])
        total -= by + ACTION_COST * (gain**2 * by + own)
        by = (1 + gain) ** 2 * by + np.array([2 * (1 + gain) * square, 2 * sd])
        square = (1 + gain) ** 2 * square + sd**2 + NOISE_SD**2
    return total


def optimal_return(horizon: int = 20) -> float:
    """Best expected return of any policy, by the Riccati recursion: a gain of its own for each decision."""
    value, noise_cost = 0.0, 0.0
    for _ in range(horizon):
        noise_cost += value * NOISE_SD**2
        value = 1 + value - value**2 / (ACTION_COST + value)
    return -(value * (START_MEAN**2 + START_SD**2) + noise_cost)


class LQR(Problem):
    """A point on a line that should rest at 0; the observation is its position.

    Args:
        horizon: decisions of an episode.
    """

    def __init__(self, horizon: int = 20) -> None:
        self.horizon = horizon
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " 1"]:
        return generator.standard_normal(1)

    def noise(self, generator: np.random.Generator) -> Float[np.ndarray, "H 1"]:
        return generator.standard_normal((self.horizon, 1))

    def start(self, noise: np.ndarray) -> State:
        return {"x": START_MEAN + START_SD * noise[:, 0]}

    def observe(self, state: State) -> np.ndarray:
        return state["x"][:, None].astype(np.float32)

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        x, action = state["x"], actions[:, 0]
        reward = -(x**2 + ACTION_COST * action**2)
        state["x"] = x + action + NOISE_SD * noise[:, 0]
        return Outcome(reward, np.zeros(len(reward), dtype=bool))


class LQREnv(ProblemEnv):
    """`polopt/LQR-v0`."""

    problem_class = LQR


class LQRVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/LQR-v0`."""

    problem_class = LQR
