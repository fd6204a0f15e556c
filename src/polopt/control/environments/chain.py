"""Six states in a row with a small reward near by and a large one far away (after arXiv 2302.01734), gradient known.

Two actions move left (0) and right (1) with probability 0.8, else the other way; walls reflect. A decision in the right
end pays 1, in the left end 0.2, elsewhere nothing; 20 decisions from state 2. With discount 0.9 the uniform policy is
worth 1.076 and the best one 3.946. Exact returns and gradients: `polopt.control.environments.tabular` on `chain_model()`.

    polopt/Chain-v0    horizon: decisions of an episode; one_hot: observe the state as a vector, not as its number
"""

import numpy as np

from polopt.control.environments.problem import ProblemEnv, ProblemVectorEnv
from polopt.control.environments.tabular import TabularModel, TabularProblem


def chain_model(states: int = 6, start: int = 2, success: float = 0.8) -> TabularModel:
    """The chain as a finite process.

    Example:
        >>> from polopt.control.environments.tabular import optimal_return
        >>> round(optimal_return(chain_model(), gamma=0.9, horizon=20), 3)
        3.946
    """
    here = np.arange(states)
    left, right = np.eye(states)[np.maximum(here - 1, 0)], np.eye(states)[np.minimum(here + 1, states - 1)]
    forward = success * right + (1 - success) * left
    transition = np.stack([success * left + (1 - success) * right, forward], 1)
    reward = np.zeros_like(transition)
    reward[0], reward[-1] = 0.2, 1.0
    return TabularModel(transition, reward, np.eye(states)[start])


class Chain(TabularProblem):
    """The chain, for `horizon` decisions.

    Args:
        horizon: decisions of an episode.
        one_hot: observe the state as a one-hot vector.
    """

    def __init__(self, horizon: int = 20, one_hot: bool = False) -> None:
        super().__init__(chain_model(), horizon, one_hot=one_hot)


class ChainEnv(ProblemEnv):
    """`polopt/Chain-v0`."""

    problem_class = Chain


class ChainVectorEnv(ProblemVectorEnv):
    """Episodes of `polopt/Chain-v0`."""

    problem_class = Chain
