"""Exact optimisation of a proxy on tables: occupancy against action regularisation, without sampling.

Every problem is optimised from its reference policy with every coefficient, all of them side by side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import one_hot

from polopt.control.environments.reward_hacking import TomatoWatering, ring_models, ring_reference
from polopt.methods.preference.orpo_divergences import (
    FLOOR,
    categorical_chi2,
    categorical_kl,
    hacking_lower_bound,
    occupancy_measure,
)

GAMMA, STEPS, LR = 0.95, 1500, 0.05
COEFFICIENTS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
KINDS = ("occupancy_sqrt_chi2", "occupancy_kl", "action_sqrt_chi2", "action_kl")
CORRELATION = 0.3
"""Of proxy and true reward under the reference, in the random tables."""


class Tables(NamedTuple):
    """B problems: transitions [B, S, A, S], start [B, S], rewards and reference policy [B, S, A]."""

    transitions: Tensor
    start: Tensor
    reward: Tensor
    proxy: Tensor
    policy: Tensor

    def occupancy(self, policy: Tensor) -> Tensor:
        """Of policies [B, S, A]."""
        return vmap(lambda t, s, p: occupancy_measure(t, s, p, GAMMA))(self.transitions, self.start, policy)

    def true_return(self, policy: Tensor) -> Tensor:
        """Average true reward of a step [B]."""
        return (self.occupancy(policy) * self.reward).sum((-1, -2))

    def repeat(self, times: int) -> "Tables":
        """Every problem `times` times, one after the other."""
        return Tables(*(table.repeat_interleave(times, 0) for table in self))


def ring() -> Tables:
    """The ring with the trap."""
    proxy, true = ring_models()
    tables = true.transition, true.start, true.expected_reward, proxy.expected_reward, ring_reference()
    return Tables(*(torch.tensor(table)[None] for table in tables))


def tomatoes() -> Tables:
    """The small tomato grid, 9 cells by 8 sets of watered tomatoes, and a reference 40 steps up the true reward."""
    problem = TomatoWatering()
    cells, count = len(problem.moves), len(problem.tomatoes)
    watered = torch.cartesian_prod(*[torch.arange(2)] * count).double()
    there = torch.tensor(problem.moves)
    reached = there[..., None] == torch.tensor(problem.tomatoes)
    chance = torch.where(reached[:, None], 1.0, (1 - problem.dry_probability) * watered[:, None])
    sets = torch.where(watered == 1, chance[..., None, :], 1 - chance[..., None, :]).prod(-1)
    moved = one_hot(there, cells).double()
    states = cells * len(watered)
    transitions = torch.einsum("saw,scaz->scawz", moved, sets).reshape(states, 5, states)
    true = watered.mean(-1).expand(cells, -1)
    seen = torch.where(torch.arange(cells)[:, None] == problem.sprinkler, 1.0, true)
    reward, proxy = (torch.einsum("sat,t->sa", transitions, of.flatten()) for of in (true, seen))
    start = torch.zeros(cells, len(watered), dtype=torch.float64)
    start[problem.first] = 1 / len(watered)
    uniform = torch.full_like(reward, 1 / 5)
    known = Tables(*(table[None] for table in (transitions, start.flatten(), reward, reward, uniform)))
    policy = optimise(known, "action_kl", torch.zeros(1, dtype=torch.float64), steps=40)
    return known._replace(proxy=proxy[None], policy=policy)


def random_tables(count: int, states: int = 6, actions: int = 3) -> Tables:
    """Random problems with a fair reference (30 steps up the true reward) and a proxy of correlation 0.3 under it."""
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=draws, dtype=torch.float64)

    transitions, start = (2 * normal(states, actions, states)).softmax(-1), normal(states).softmax(-1)
    reward, noise = normal(states, actions), normal(states, actions)
    uniform = torch.full_like(reward, 1 / actions)
    true = Tables(transitions, start, reward, reward, uniform)
    policy = optimise(true, "action_kl", torch.zeros(count, dtype=torch.float64), steps=30)
    weight = true.occupancy(policy)

    def standardised(values: Tensor) -> Tensor:
        centred = values - (weight * values).sum((-1, -2), keepdim=True)
        return centred / (weight * centred.square()).sum((-1, -2), keepdim=True).sqrt()

    known = standardised(reward)
    apart = standardised(noise)
    apart = standardised(apart - known * (weight * apart * known).sum((-1, -2), keepdim=True))
    proxy = CORRELATION * known + (1 - CORRELATION**2) ** 0.5 * apart
    return Tables(transitions, start, known, proxy, policy)


def divergence(tables: Tables, kind: str, policy: Tensor, occupancy: Tensor, reference: Tensor) -> Tensor:
    """What is paid for [B]; the baselines' states count as often as they are visited, a constant."""
    if kind.startswith("occupancy"):
        pair = occupancy.flatten(1), reference.flatten(1)
        return (
            categorical_kl(*pair) if kind.endswith("kl") else categorical_chi2(*pair).clamp(min=1e-12).sqrt()
        )
    pair = policy, tables.policy
    each = categorical_kl(*pair) if kind.endswith("kl") else categorical_chi2(*pair).clamp(min=FLOOR).sqrt()
    return (occupancy.sum(-1).detach() * each).sum(-1)


def optimise(tables: Tables, kind: str, coefs: Tensor, steps: int = STEPS) -> Tensor:
    """Policies [B, S, A] after Adam's steps up the proxy less the divergence, from the reference; coefficients [B]."""
    logits = tables.policy.log().requires_grad_()
    adam = torch.optim.Adam([logits], LR)
    reference = tables.occupancy(tables.policy)
    for _ in range(steps):
        policy = logits.softmax(-1)
        occupancy = tables.occupancy(policy)
        cost = coefs * divergence(tables, kind, policy, occupancy, reference)
        (logits.grad,) = torch.autograd.grad((cost - (occupancy * tables.proxy).sum((-1, -2))).sum(), logits)
        adam.step()
    return logits.detach().softmax(-1)


def sweep(tables: Tables) -> dict[str, Any]:
    """True returns of the reference [B], unregularised [B], and by kind [B][coefficient]."""
    count = len(tables.policy)
    many = tables.repeat(len(COEFFICIENTS))
    coefs = torch.tensor(COEFFICIENTS, dtype=torch.float64).repeat(count)
    free = optimise(tables, KINDS[0], torch.zeros(count, dtype=torch.float64))
    return {
        "coefficients": COEFFICIENTS,
        "reference": tables.true_return(tables.policy).tolist(),
        "unregularised": tables.true_return(free).tolist(),
        **{kind: many.true_return(optimise(many, kind, coefs)).view(count, -1).tolist() for kind in KINDS},
    }


def correlations(tables: Tables) -> list[float]:
    """Of proxy and true reward under each problem's reference."""
    about = (
        hacking_lower_bound(mu, mu, reward, proxy)
        for mu, reward, proxy in zip(
            tables.occupancy(tables.policy), tables.reward, tables.proxy, strict=True
        )
    )
    return [float(found.correlation) for found in about]
