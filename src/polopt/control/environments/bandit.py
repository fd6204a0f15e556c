"""Problems of a single decision whose gradients are known: a bandit with two arms, and one with a Gaussian action.

    polopt/TwoArmedBandit-v0    arms: mean rewards; reward_sd: normal noise of the rewards
    polopt/GaussianBandit-v0    reward: "linear" (r = a) or "quadratic" (r = a squared)

The second is the bandit of Bayesian policy gradients (Ghavamzadeh et al., JMLR 17(66), 2016): with a ~ N(0, 1) the
gradient of the expected reward with respect to mean and standard deviation is (1, 0) and (0, 2).
"""

from typing import Literal

import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from polopt.control.environments.problem import Outcome, Problem, ProblemEnv, ProblemVectorEnv, State
from polopt.control.environments.tabular import softmax
from polopt.errors import ConfigError


def two_armed_return(logits: Float[np.ndarray, " 2"], arms: tuple[float, float] = (0.0, 1.0)) -> float:
    """Expected reward of the softmax policy."""
    return float(softmax(np.asarray(logits, dtype=float)) @ np.asarray(arms))


def two_armed_gradient(
    logits: Float[np.ndarray, " 2"], arms: tuple[float, float] = (0.0, 1.0)
) -> Float[np.ndarray, " 2"]:
    """Gradient of the expected reward with respect to the logits: p_i (mean of arm i - expected reward).

    Example:
        >>> two_armed_gradient(np.zeros(2)).tolist()
        [-0.25, 0.25]
    """
    policy = softmax(np.asarray(logits, dtype=float))
    return policy * (np.asarray(arms) - policy @ np.asarray(arms))


def gaussian_return(mean: float, sd: float, reward: Literal["linear", "quadratic"] = "linear") -> float:
    """Expected reward of a ~ N(mean, sd squared)."""
    return mean if reward == "linear" else mean**2 + sd**2


def gaussian_gradient(
    mean: float, sd: float, reward: Literal["linear", "quadratic"] = "linear"
) -> Float[np.ndarray, " 2"]:
    """Gradient of the expected reward with respect to mean and standard deviation.

    Example:
        >>> gaussian_gradient(0.0, 1.0, "quadratic").tolist()
        [0.0, 2.0]
    """
    return np.array([1.0, 0.0] if reward == "linear" else [2 * mean, 2 * sd])


class Bandit(Problem):
    """One decision, nothing to see: the observation is 0."""

    horizon = 1

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def start(self, noise: np.ndarray) -> State:
        return {}

    def observe(self, state: State) -> np.ndarray:
        return np.zeros((len(state["time"]), 1), dtype=np.float32)


class TwoArmedBandit(Bandit):
    """Two arms with normal rewards.

    Args:
        arms: their mean rewards.
        reward_sd: standard deviation of the rewards.
    """

    def __init__(self, arms: tuple[float, float] = (0.0, 1.0), reward_sd: float = 1.0) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(2)
        self.arms, self.reward_sd = np.asarray(arms, dtype=float), reward_sd

    def noise(self, generator: np.random.Generator) -> Float[np.ndarray, "1 1"]:
        return generator.standard_normal((1, 1))

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        reward = self.arms[actions] + self.reward_sd * noise[:, 0]
        return Outcome(reward, np.ones(len(reward), dtype=bool))


class GaussianBandit(Bandit):
    """A real action whose reward is itself or its square.

    Args:
        reward: "linear" or "quadratic".
    """

    def __init__(self, reward: Literal["linear", "quadratic"] = "linear") -> None:
        super().__init__()
        if reward not in ("linear", "quadratic"):
            raise ConfigError(f"reward = {reward!r}: is not one of linear, quadratic")
        self.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.reward = reward

    def move(self, state: State, actions: np.ndarray, noise: np.ndarray) -> Outcome:
        reward = actions[:, 0] if self.reward == "linear" else actions[:, 0] ** 2
        return Outcome(reward, np.ones(len(reward), dtype=bool))


class TwoArmedBanditEnv(ProblemEnv):
    """`polopt/TwoArmedBandit-v0`."""

    problem_class = TwoArmedBandit


class TwoArmedBanditVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/TwoArmedBandit-v0`."""

    problem_class = TwoArmedBandit


class GaussianBanditEnv(ProblemEnv):
    """`polopt/GaussianBandit-v0`."""

    problem_class = GaussianBandit


class GaussianBanditVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/GaussianBandit-v0`."""

    problem_class = GaussianBandit
