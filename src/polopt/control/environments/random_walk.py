"""The random walk of Bayesian actor-critic (Ghavamzadeh et al., JMLR 17(66), 2016), gradient known.

States 1 to 10 in a row, start in 1, the end in 10; the actions go left (0; in state 1 it stays) and right (1). Each
decision pays 1 in the mean, with normal noise of standard deviation 0.1. Observations count from 0.

RECONSTRUCTED: the details of rewards and borders are those of the known descriptions; the published text was not at hand.

    polopt/RandomWalk-v0    states, reward_sd, horizon: decisions after which an episode is cut, one_hot
"""

import numpy as np
from jaxtyping import Float

from polopt.control.environments.problem import ProblemEnv, ProblemVectorEnv
from polopt.control.environments.tabular import (
    TabularModel,
    TabularProblem,
    policy_gradient,
    policy_return,
    softmax,
)


def random_walk_model(states: int = 10) -> TabularModel:
    """The walk, with an end that absorbs and pays nothing."""
    transition = np.zeros((states, 2, states))
    for state in range(states - 1):
        transition[state, 0, max(state - 1, 0)] = 1.0
        transition[state, 1, state + 1] = 1.0
    transition[-1, :, -1] = 1.0
    reward = np.ones_like(transition)
    reward[-1] = 0.0
    return TabularModel(transition, reward, np.eye(states)[0])


def _logits(theta: Float[np.ndarray, " S-1"]) -> Float[np.ndarray, "S 2"]:
    right = np.append(theta, 0.0)
    return np.stack([np.zeros_like(right), right], 1)


def random_walk_return(theta: Float[np.ndarray, " S-1"], gamma: float = 0.99) -> float:
    """Expected discounted return of the policy that goes right in state x with probability 1 / (1 + exp(-theta_x))."""
    logits = _logits(np.asarray(theta, dtype=float))
    return policy_return(random_walk_model(len(logits)), softmax(logits), gamma)


def true_gradient(theta: Float[np.ndarray, " S-1"], gamma: float = 0.99) -> Float[np.ndarray, " S-1"]:
    """Gradient of `random_walk_return` with respect to theta."""
    logits = _logits(np.asarray(theta, dtype=float))
    return policy_gradient(random_walk_model(len(logits)), logits, gamma)[:-1, 1]


class RandomWalk(TabularProblem):
    """A walk along a row.

    Args:
        states: length of the row.
        reward_sd: standard deviation of the rewards.
        horizon: decisions after which an episode is cut.
        one_hot: observe the state as a one-hot vector.
    """

    ends_at_horizon = False

    def __init__(
        self, states: int = 10, reward_sd: float = 0.1, horizon: int = 1000, one_hot: bool = False
    ) -> None:
        end = np.eye(states, dtype=bool)[-1]
        super().__init__(random_walk_model(states), horizon, end, reward_sd, one_hot)


class RandomWalkEnv(ProblemEnv):
    """`polopt/RandomWalk-v0`."""

    problem_class = RandomWalk


class RandomWalkVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/RandomWalk-v0`."""

    problem_class = RandomWalk
