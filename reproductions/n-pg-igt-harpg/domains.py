"""The two miniatures, many runs at once: each of R runs has its own parameters, theta[r]."""

import torch
from jaxtyping import Float
from torch import Tensor

GAMMA, HORIZON = 0.9, 20
DISCOUNTS = GAMMA ** torch.arange(HORIZON, dtype=torch.float64)


class Point:
    """Drive a point in the plane to a target by a linear Gaussian policy: theta is [K, b], 2 x 3."""

    shape = (2, 3)
    scale = 0.5
    """Standard deviation of the actions."""
    target = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def step(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The next point and the reward, of points and actions [..., 2]."""
        drift = torch.stack([0.3 * x[..., 1].sin(), torch.zeros_like(x[..., 1])], -1)
        x = x + drift + 0.4 * a
        return x, (-(x - self.target).square().sum(-1) / 2).exp()

    def mean(self, theta: Tensor, x: Tensor) -> Tensor:
        """Mean action at points [R, n, ..., 2]."""
        return torch.einsum("rij,rn...j->rn...i", theta[..., :2], x) + theta[..., 2].view(
            len(theta), *[1] * (x.dim() - 2), 2
        )

    def rollout(
        self, theta: Float[Tensor, "R 2 3"], count: int, draws: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Float[Tensor, "R n T"]]:
        """Points and actions [R, n, T, 2], and rewards, differentiable by reparametrisation."""
        noise = torch.randn(len(theta), count, HORIZON + 1, 2, generator=draws, dtype=torch.float64)
        x, points, actions, rewards = noise[:, :, 0], [], [], []
        for t in range(HORIZON):
            a = self.mean(theta, x) + self.scale * noise[:, :, t + 1]
            points.append(x)
            actions.append(a)
            x, reward = self.step(x, a)
            rewards.append(reward)
        return (torch.stack(points, 2), torch.stack(actions, 2)), torch.stack(rewards, -1)

    def logp(self, theta: Tensor, decisions: tuple[Tensor, Tensor]) -> Float[Tensor, "R n T"]:
        """Log-density of the actions, up to a constant."""
        points, actions = decisions
        return -((actions - self.mean(theta, points)) / self.scale).square().sum(-1) / 2

    def value(self, theta: Tensor, count: int = 10000) -> tuple[Tensor, Tensor]:
        """J and its gradient of each run, by reparametrised gradients over `count` trajectories."""
        theta = theta.detach().requires_grad_()
        draws = torch.Generator().manual_seed(12345)
        found = (self.rollout(theta, count, draws)[1] * DISCOUNTS).sum(-1).mean(-1)
        return found.detach(), torch.autograd.grad(found.sum(), theta)[0]


class Chain:
    """Six states in a row, rewards at the ends, two slippery actions, a tabular softmax policy: theta is 6 x 2."""

    shape = (6, 2)
    start = 2

    def __init__(self) -> None:
        size = self.shape[0]
        move = torch.zeros(size, 2, size, dtype=torch.float64)
        for s in range(size):
            for action, near, far in (
                (0, max(s - 1, 0), min(s + 1, size - 1)),
                (1, min(s + 1, size - 1), max(s - 1, 0)),
            ):
                move[s, action, near] += 0.8
                move[s, action, far] += 0.2
        self.move, self.rewards = move, torch.zeros(size, dtype=torch.float64)
        self.rewards[-1], self.rewards[0] = 1.0, 0.2

    def rollout(
        self, theta: Float[Tensor, "R 6 2"], count: int, draws: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Float[Tensor, "R n T"]]:
        """States and actions [R, n, T], and rewards."""
        runs, last = torch.arange(len(theta))[:, None], self.shape[0] - 1
        uniforms = torch.rand(2, HORIZON, len(theta), count, generator=draws, dtype=torch.float64)
        right = theta.detach().softmax(-1)[..., 1]
        s = torch.full((len(theta), count), self.start)
        states, actions = [], []
        for t in range(HORIZON):
            a = (uniforms[0, t] < right[runs, s]).long()
            states.append(s)
            actions.append(a)
            forward = (uniforms[1, t] < 0.8).long()
            s = (s + torch.where(a == forward, 1, -1)).clamp(0, last)
        states = torch.stack(states, -1)
        return (states, torch.stack(actions, -1)), self.rewards[states]

    def logp(self, theta: Tensor, decisions: tuple[Tensor, Tensor]) -> Float[Tensor, "R n T"]:
        """Log-probability of the actions."""
        states, actions = decisions
        return theta.log_softmax(-1)[torch.arange(len(theta))[:, None, None], states, actions]

    def value(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """J and its gradient of each run, exactly."""
        theta = theta.detach().requires_grad_()
        policy = theta.softmax(-1)
        at = torch.zeros(len(theta), self.shape[0], dtype=torch.float64)
        at[:, self.start] = 1
        found = torch.zeros(len(theta), dtype=torch.float64)
        for discount in DISCOUNTS:
            found = found + discount * at @ self.rewards
            at = torch.einsum("rs,rsa,sax->rx", at, policy, self.move)
        return found.detach(), torch.autograd.grad(found.sum(), theta)[0]
