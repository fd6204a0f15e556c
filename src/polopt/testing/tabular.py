"""Random finite Markov decision processes in which values are exact, to check what a method promises."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor


class Values(NamedTuple):
    """What a policy is worth."""

    q: Tensor
    """Action values [S, A]."""
    value: Tensor
    """State values [S]."""
    advantage: Tensor
    """q - value [S, A]."""


@dataclass(frozen=True)
class TabularMDP:
    """A finite Markov decision process with discounted rewards, float64."""

    transition: Float[Tensor, "S A S"]
    """Probabilities of the next state."""
    reward: Float[Tensor, "S A"]
    """Expected reward of each action."""
    gamma: float
    """Discount."""

    @classmethod
    def random(cls, seed: int, states: int = 20, actions: int = 4, gamma: float = 0.9) -> Self:
        """Exponential weights normalised to transitions (uniform on the simplex), standard normal rewards."""
        draws = torch.Generator().manual_seed(seed)
        weight = torch.empty(states, actions, states, dtype=torch.float64).exponential_(generator=draws)
        reward = torch.randn(states, actions, generator=draws, dtype=torch.float64)
        return cls(weight / weight.sum(-1, keepdim=True), reward, gamma)

    def evaluate(self, policy: Float[Tensor, "S A"]) -> Values:
        """The exact values of a policy."""
        kernel = torch.einsum("sa,sax->sx", policy, self.transition)
        identity = torch.eye(len(policy), dtype=torch.float64)
        value = torch.linalg.solve(identity - self.gamma * kernel, (policy * self.reward).sum(-1))
        q = self.reward + self.gamma * self.transition @ value
        return Values(q, value, q - value[:, None])

    def visits(self, policy: Float[Tensor, "S A"]) -> Float[Tensor, "S S"]:
        """Discounted share of time in each state (columns) when starting in each state (rows); rows sum to 1."""
        kernel = torch.einsum("sa,sax->sx", policy, self.transition)
        identity = torch.eye(len(policy), dtype=torch.float64)
        return (1 - self.gamma) * torch.linalg.inv(identity - self.gamma * kernel)

    def optimal(self) -> Float[Tensor, "S A"]:
        """The best deterministic policy, by policy iteration."""
        choice = self.reward.argmax(-1)
        while True:
            policy = torch.nn.functional.one_hot(choice, self.reward.shape[1]).double()
            better = self.evaluate(policy).q
            best = better.argmax(-1)
            gain = better.gather(-1, best[:, None]) - better.gather(-1, choice[:, None])
            if bool((gain <= 1e-12).all()):
                return policy
            choice = best
