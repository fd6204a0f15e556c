"""Three small problems whose policy gradient is known in closed form, sampled many episodes at once."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

F64 = torch.float64


def bandit(count: int, power: int, draws: Generator) -> tuple[Tensor, Tensor]:
    """Scores [count, 2] and rewards a^power of actions a ~ N(0, 1), with respect to mean and standard deviation."""
    action = torch.randn(count, generator=draws, dtype=F64)
    return torch.stack([action, action.square() - 1], -1), action**power


BANDIT_FISHER = torch.diag(torch.tensor([1.0, 2.0], dtype=F64))
BANDIT_TRUTH = {1: torch.tensor([1.0, 0.0], dtype=F64), 2: torch.tensor([0.0, 2.0], dtype=F64)}


@dataclass(frozen=True)
class LinearQuadratic:
    """x' = x + a + N(0, 0.01^2), a ~ N(gain x, spread^2), cost x^2 + 0.1 a^2, 20 steps from x_0 ~ N(0.3, 0.001^2)."""

    steps: int = 20
    start: float = 0.3
    start_spread: float = 0.001
    noise: float = 0.01
    price: float = 0.1

    def cost(self, gain: Tensor, spread: Tensor) -> Tensor:
        """Expected cost of an episode, exact."""
        second = torch.as_tensor(self.start**2 + self.start_spread**2, dtype=F64)
        total = torch.zeros((), dtype=F64)
        for _ in range(self.steps):
            total = total + second + self.price * (gain.square() * second + spread.square())
            second = (1 + gain).square() * second + spread.square() + self.noise**2
        return total

    def gradient(self, gain: float, spread: float) -> Tensor:
        """Gradient of the expected return with respect to gain and spread, exact."""
        theta = torch.tensor([gain, spread], dtype=F64, requires_grad=True)
        (found,) = torch.autograd.grad(-self.cost(theta[0], theta[1]), theta)
        return found

    def fisher(self, gain: float, spread: float) -> Tensor:
        """Fisher matrix of an episode with respect to gain and spread, exact."""
        second, total = self.start**2 + self.start_spread**2, 0.0
        for _ in range(self.steps):
            total += second
            second = (1 + gain) ** 2 * second + spread**2 + self.noise**2
        return torch.diag(torch.tensor([total, 2.0 * self.steps], dtype=F64) / spread**2)

    def sample(self, gain: float, spread: float, count: int, draws: Generator) -> tuple[Tensor, Tensor]:
        """Scores [count, 2] with respect to gain and spread, and returns [count]."""
        noise = torch.randn(2 * self.steps + 1, count, generator=draws, dtype=F64)
        state = self.start + self.start_spread * noise[-1]
        scores, returns = torch.zeros(count, 2, dtype=F64), torch.zeros(count, dtype=F64)
        for step in range(self.steps):
            push = spread * noise[2 * step]
            action = gain * state + push
            scores[:, 0] += push * state / spread**2
            scores[:, 1] += (push.square() - spread**2) / spread**3
            returns -= state.square() + self.price * action.square()
            state = state + action + self.noise * noise[2 * step + 1]
        return scores, returns


@dataclass(frozen=True)
class RandomWalk:
    """States 1 to 10 from 1 on; 10 ends the walk; left of 1 is 1. Mean reward 1 per step, plus N(0, 0.1^2)."""

    last: int = 9
    gamma: float = 0.99
    reward_spread: float = 0.1
    right: float = 41 / 50

    def gradient(self) -> Tensor:
        """Gradient [9] of the expected discounted return with respect to the logits of going right, exact."""
        theta = torch.full(
            (self.last,), math.log(self.right / (1 - self.right)), dtype=F64, requires_grad=True
        )
        right, place = theta.sigmoid(), torch.arange(self.last)
        moves = torch.zeros(self.last, self.last, dtype=F64)
        moves = moves.index_put((place[:-1], place[1:]), right[:-1], accumulate=True)
        moves = moves.index_put((place, (place - 1).clamp(min=0)), 1 - right, accumulate=True)
        eye = torch.eye(self.last, dtype=F64)
        value = torch.linalg.solve(eye - self.gamma * moves, torch.ones(self.last, dtype=F64))
        return torch.autograd.grad(value[0], theta)[0]

    def sample(self, count: int, draws: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mask [count, T], states [count, T] from 0, scores [count, T, 9] and rewards [count, T] of whole walks."""
        state = torch.zeros(count, dtype=torch.int64)
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        while bool((alive := state < self.last).any()):
            goes_right = torch.rand(count, generator=draws, dtype=F64) < self.right
            columns.append((alive, state, goes_right))
            state = torch.where(alive, torch.where(goes_right, state + 1, (state - 1).clamp(min=0)), state)
        alive, states, rights = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        states = torch.where(alive, states, 0)
        scores = torch.nn.functional.one_hot(states, self.last).to(F64)
        scores = scores * (rights.to(F64) - self.right)[..., None] * alive[..., None]
        noise = self.reward_spread * torch.randn(alive.shape, generator=draws, dtype=F64)
        return alive, states, scores, torch.where(alive, 1 + noise, 0.0)
