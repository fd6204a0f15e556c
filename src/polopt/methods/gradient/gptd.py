r"""Gaussian process temporal differences (Engel, Mannor & Meir, 2005): the posterior of Q given whole episodes.

In closed form over all decisions, and by the sparse recursion over a dictionary of them. Any kernel between decisions
will do; `bayesian_ac` has that of the actor-critic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.functional.returns import rewards_to_go
from polopt.methods.gradient.bayesian_pg import Dictionary, GradientPosterior
from polopt.methods.gradient.fisher import Fisher

Kernel = Callable[[list[int], int], Tensor]
"""Kernel of the points in a list with one point, [m]."""


@dataclass(frozen=True)
class ActionValues:
    """The posterior of Q at D decisions, and through it that of the gradient."""

    alpha: Float[Tensor, " D"]
    """Q(z) = k(z)^T alpha."""
    reduction: Float[Tensor, "D D"]
    """C: the covariance of Q is k(z, z') - k(z)^T C k(z')."""

    def gradient(self, scores: Float[Tensor, "D n"], fisher: Fisher, c_fisher: float) -> GradientPosterior:
        """Equation (posterior); scores of the same decisions."""
        return GradientPosterior(
            scores.double(),
            c_fisher * self.alpha,
            lambda: c_fisher * fisher.matrix(),
            c_fisher**2 * self.reduction,
        )


def gptd(
    rewards: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    kernel: Float[Tensor, "D D"],
    gamma: float,
    noise: float,
) -> ActionValues:
    """The posterior of Q, equation (posterior), for D decisions in the order of the rows.

    Args:
        rewards: reward of each decision.
        mask: the decisions; an episode ends with its last.
        kernel: of all pairs of decisions.
        gamma: discount per decision.
        noise: sigma^2, variance of the noise of a return, above 0.
    """
    returns = rewards_to_go(rewards.double(), mask, gamma)[mask]
    factor = torch.linalg.cholesky(kernel + noise * torch.eye(len(kernel)).to(kernel))
    alpha = torch.cholesky_solve(returns[:, None], factor)[:, 0]
    return ActionValues(alpha, torch.cholesky_inverse(factor))


@dataclass(frozen=True)
class _State:
    """What the recursion carries from one decision of an episode to the next."""

    onto: Tensor
    kernel: Tensor
    own: Tensor
    c: Tensor
    d: Tensor
    s: Tensor


class SparseGPTD:
    """The sparse episodic recursion for Q, one decision after the other.

    Args:
        kernel: between the decisions, by their numbers.
        own: kernel of each decision with itself.
        gamma: discount per decision.
        noise: sigma^2, above 0.
        nu: threshold of the dictionary, in units of the kernel; below 0 every decision enters.
    """

    def __init__(
        self, kernel: Kernel, own: Float[Tensor, " D"], gamma: float, noise: float, nu: float
    ) -> None:
        self._kernel, self._own = kernel, own
        self._gamma, self._noise, self._nu = gamma, noise, nu
        self._dictionary = Dictionary()
        self._alpha, self._c = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._state: _State | None = None

    @property
    def members(self) -> Int[Tensor, " m"]:
        """Decisions of the dictionary."""
        return torch.tensor(self._dictionary.members, dtype=torch.int64)

    @property
    def values(self) -> ActionValues:
        """The posterior so far, over the dictionary's decisions."""
        return ActionValues(self._alpha, self._c)

    def visit(self, point: int, reward: float) -> None:
        """The next decision of the episode, reached with the reward of the decision before (ignored at its start)."""
        kernel, own = self._kernel(self._dictionary.members, point), self._own[point]
        onto, distance = self._dictionary.project(kernel, own)
        enters = distance > self._nu or not self._dictionary.members
        if self._state is not None:
            self._transition(self._state, kernel, own, None if enters else onto, reward)
        zero = torch.zeros((), dtype=torch.float64)
        if enters:
            self._dictionary.add(point, kernel, own)
            kernel = torch.cat([kernel, own[None]])
            onto = torch.zeros_like(kernel)
            onto[-1] = 1.0
            if self._state is None:
                self._grow()
        size = len(self._alpha)
        before = self._state or _State(onto, kernel, own, onto.new_zeros(size), zero, zero + math.inf)
        self._state = _State(onto, kernel, own, before.c, before.d, before.s)

    def end(self, reward: float) -> None:
        """The reward of the episode's last decision."""
        assert self._state is not None
        old, share = self._state, self._share
        delta = old.kernel
        d = share * old.d + reward - delta @ self._alpha
        c = share * old.c + old.onto - self._c @ delta
        s = self._noise - self._gamma * self._noise * share + delta @ (c + share * old.c)
        self._update(c, d, s)
        self._state = None

    @property
    def _share(self) -> Tensor:
        assert self._state is not None
        return self._gamma * self._noise / self._state.s

    def _transition(
        self, old: _State, kernel: Tensor, own: Tensor, onto: Tensor | None, reward: float
    ) -> None:
        gamma, noise, share = self._gamma, self._noise, self._share
        delta = old.kernel - gamma * kernel
        d = share * old.d + reward - delta @ self._alpha
        at_delta = self._c @ delta
        if onto is None:
            change = old.onto.new_full((1,), -gamma)
            apart = old.onto @ (old.kernel - 2 * gamma * kernel) + gamma**2 * own
            s = (1 + gamma**2) * noise + apart - delta @ at_delta
            s = s + 2 * share * (old.c @ delta) - gamma * noise * share
            c = share * old.c - at_delta + old.onto
            c = torch.cat([c, change])
            self._grow()
        else:
            c = share * old.c + old.onto - gamma * onto - at_delta
            s = (1 + gamma**2) * noise + delta @ (c + share * old.c) - gamma * noise * share
        self._update(c, d, s)
        self._state = _State(old.onto, old.kernel, old.own, c, d, s)

    def _grow(self) -> None:
        self._alpha = torch.nn.functional.pad(self._alpha, (0, 1))
        self._c = torch.nn.functional.pad(self._c, (0, 1, 0, 1))

    def _update(self, c: Tensor, d: Tensor, s: Tensor) -> None:
        self._alpha = self._alpha + c * (d / s)
        self._c = self._c + torch.outer(c, c) / s


def sparse_gptd(
    rewards: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    kernel: Kernel,
    own: Float[Tensor, " D"],
    gamma: float,
    noise: float,
    nu: float,
) -> tuple[ActionValues, Int[Tensor, " m"]]:
    """The posterior of Q over a dictionary of m decisions, and which they are. Arguments as for `gptd`, `SparseGPTD`."""
    found = SparseGPTD(kernel, own, gamma, noise, nu)
    values, point = rewards.double()[mask].tolist(), 0
    for length in mask.sum(-1).tolist():
        for step in range(length):
            found.visit(point + step, values[point + step - 1] if step else 0.0)
        point += length
        if length:
            found.end(values[point - 1])
    return found.values, found.members
