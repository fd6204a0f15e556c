"""Finite Markov decision processes: exact returns and policy gradients, and the problem that plays one."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gymnasium import spaces
from jaxtyping import Bool, Float

from polopt.control.environments.problem import Outcome, Problem, State


@dataclass(frozen=True)
class TabularModel:
    """A finite process. The reward of a decision may depend on where it leads."""

    transition: Float[np.ndarray, "S A S"]
    """Probability of each next state."""
    reward: Float[np.ndarray, "S A S"]
    """Mean reward of each move."""
    start: Float[np.ndarray, " S"]
    """Distribution of the start state."""

    @cached_property
    def expected_reward(self) -> Float[np.ndarray, "S A"]:
        """Mean reward of each decision."""
        return (self.transition * self.reward).sum(-1)


def softmax(logits: Float[np.ndarray, "S A"]) -> Float[np.ndarray, "S A"]:
    """Probabilities of the actions in each state."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def occupancy(
    model: TabularModel, policy: Float[np.ndarray, "S A"], gamma: float
) -> Float[np.ndarray, "S A"]:
    """Discounted visits to each decision over an infinite horizon; they sum to 1 / (1 - gamma)."""
    moves = np.einsum("sa,sat->st", policy, model.transition)
    visits = np.linalg.solve(np.eye(len(moves)) - gamma * moves.T, model.start)
    return visits[:, None] * policy


def policy_return(
    model: TabularModel, policy: Float[np.ndarray, "S A"], gamma: float, horizon: int | None = None
) -> float:
    """Expected discounted return; of the first `horizon` decisions, or of all if None (then gamma < 1)."""
    if horizon is None:
        return float((occupancy(model, policy, gamma) * model.expected_reward).sum())
    values = _finite_values(model, policy, gamma, horizon)
    return float(model.start @ values[0])


def policy_gradient(
    model: TabularModel, logits: Float[np.ndarray, "S A"], gamma: float, horizon: int | None = None
) -> Float[np.ndarray, "S A"]:
    """Exact gradient of `policy_return` of the softmax policy with respect to its logits."""
    policy = softmax(logits)
    if horizon is None:
        moves = np.einsum("sa,sat->st", policy, model.transition)
        mean = (policy * model.expected_reward).sum(-1)
        value = np.linalg.solve(np.eye(len(moves)) - gamma * moves, mean)
        advantage = model.expected_reward + gamma * model.transition @ value - value[:, None]
        return occupancy(model, policy, gamma) * advantage
    values = _finite_values(model, policy, gamma, horizon)
    visits, gradient = model.start.copy(), np.zeros_like(logits)
    for step in range(horizon):
        advantage = (
            model.expected_reward + gamma * model.transition @ values[step + 1] - values[step][:, None]
        )
        gradient += gamma**step * visits[:, None] * policy * advantage
        visits = np.einsum("s,sa,sat->t", visits, policy, model.transition)
    return gradient


def optimal_return(model: TabularModel, gamma: float, horizon: int) -> float:
    """Best expected discounted return of `horizon` decisions; with a large horizon, of infinitely many."""
    value = np.zeros(len(model.start))
    for _ in range(horizon):
        value = (model.expected_reward + gamma * model.transition @ value).max(-1)
    return float(model.start @ value)


def _finite_values(
    model: TabularModel, policy: np.ndarray, gamma: float, horizon: int
) -> list[Float[np.ndarray, " S"]]:
    values = [np.zeros(len(model.start))]
    for _ in range(horizon):
        values.append((policy * (model.expected_reward + gamma * model.transition @ values[-1])).sum(-1))
    return values[::-1]


class TabularProblem(Problem):
    """Plays a `TabularModel`; an observation is the number of the state.

    Args:
        model: what is played.
        horizon: decisions of an episode.
        terminal: states in which the episode ends.
        reward_sd: standard deviation of the normal noise of the rewards.
        one_hot: observe the state as a one-hot vector.
    """

    def __init__(
        self,
        model: TabularModel,
        horizon: int,
        terminal: Bool[np.ndarray, " S"] | None = None,
        reward_sd: float = 0.0,
        one_hot: bool = False,
    ) -> None:
        states, actions = model.expected_reward.shape
        self.model, self.horizon, self.reward_sd = model, horizon, reward_sd
        self.terminal = np.zeros(states, dtype=bool) if terminal is None else terminal
        self.one_hot, self.action_space = one_hot, spaces.Discrete(actions)
        vector = spaces.Box(0.0, 1.0, (states,), np.float32)
        self.observation_space = vector if one_hot else spaces.Discrete(states)
        self._cumulative = model.transition.cumsum(-1)

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " 1"]:
        return generator.random(1)

    def noise(self, generator: np.random.Generator) -> Float[np.ndarray, "H 2"]:
        uniform = generator.random(self.horizon)
        return np.stack([uniform, generator.standard_normal(self.horizon)], 1)

    def start(self, noise: Float[np.ndarray, "N 1"]) -> State:
        return {"state": _drawn(self.model.start.cumsum()[None], noise[:, 0])}

    def observe(self, state: State) -> np.ndarray:
        here = state["state"]
        return np.eye(len(self.terminal), dtype=np.float32)[here] if self.one_hot else here.copy()

    def move(self, state: State, actions: np.ndarray, noise: Float[np.ndarray, "N 2"]) -> Outcome:
        here = state["state"]
        there = _drawn(self._cumulative[here, actions], noise[:, 0])
        reward = self.model.reward[here, actions, there] + self.reward_sd * noise[:, 1]
        state["state"] = there
        return Outcome(reward, self.terminal[there])


def _drawn(cumulative: Float[np.ndarray, "N S"], uniform: Float[np.ndarray, " N"]) -> np.ndarray:
    return np.minimum((cumulative <= uniform[:, None]).sum(-1), cumulative.shape[-1] - 1)
