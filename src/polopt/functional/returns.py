"""Returns and generalised advantages along trajectories of different lengths."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.functional.masked import zero_outside


def outcome_at_last(outcome: Float[Tensor, " N"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The trajectory's reward, placed on its last decision; lost for a trajectory without any."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(-1, keepdim=True)
    return torch.where(mask & (positions == last), outcome[:, None], torch.zeros_like(outcome[:, None]))


def generalized_advantages(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    last_value: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    gamma: float,
    gae_lambda: float,
) -> Float[Tensor, "N T"]:
    r"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), skipping masked steps.

    $A_t = \delta_t + \gamma\lambda A_{t+1}$, $\delta_t = r_t + \gamma V_{t+1} - V_t$, where t+1 is the
    trajectory's next decision that counts and V after the last one is `last_value` (0 where it terminated).

    Returns:
        Advantages [N, T] in reward units, 0 outside the mask.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    advantage, next_value = torch.zeros_like(last_value), last_value
    columns: list[Tensor] = []
    for step in reversed(range(mask.shape[1])):
        here = mask[:, step]
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        advantage = torch.where(here, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(here, values[:, step], next_value)
        columns.append(advantage)
    return zero_outside(torch.stack(columns[::-1], 1), mask) if columns else torch.zeros_like(rewards)


def rewards_to_go(
    rewards: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], gamma: float = 1.0
) -> Float[Tensor, "N T"]:
    """Discounted sum of the rewards from each decision on, 0 outside the mask."""
    no_value, no_last = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    return generalized_advantages(rewards, no_value, no_last, mask, gamma, 1.0)
