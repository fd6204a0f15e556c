"""Returns and generalised advantages along trajectories of different lengths."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

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
    length = mask.sum(-1, keepdim=True)
    if not length.numel() or not bool(length.any()):
        return torch.zeros_like(rewards)
    place = torch.empty(0)
    gaps = bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[length[:, 0] > 0, 0].all())
    if gaps:  # the decisions that count, side by side
        place = mask.cumsum(-1) - 1
        rewards, values = (_packed(tensor, place, mask) for tensor in (rewards, values))
    following = values.roll(-1, 1).scatter(1, (length - 1).clamp(min=0), last_value[:, None].to(values))
    counted = torch.arange(mask.shape[1], device=mask.device) < length
    errors = zero_outside(rewards + gamma * following - values, counted)
    advantages = discounted_sums(errors, gamma * gae_lambda)
    if gaps:
        advantages = advantages.gather(1, place.clamp(min=0))
    return zero_outside(advantages, mask)


def _packed(
    values: Float[Tensor, "N T"], place: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    width = mask.shape[1]
    return values.new_zeros(len(values), width + 1).scatter(1, place.where(mask, width), values)[:, :width]


def discounted_sums(values: Float[Tensor, "N T"], discount: float, block: int = 64) -> Float[Tensor, "N T"]:
    """s_t = x_t + discount s_{t+1} along each row: inside blocks as one product, from block to block in turn."""
    rows, width = values.shape
    if not values.numel():
        return values
    blocks = pad(values, (0, -width % block)).view(rows, -1, block)
    step = torch.arange(block, dtype=values.dtype, device=values.device)
    apart = step[:, None] - step
    powers = torch.where(apart >= 0, discount ** apart.clamp(min=0), 0.0)
    sums = (blocks @ powers).unbind(1)
    to_end = discount ** (block - step)
    found = [sums[-1]]
    for earlier in reversed(sums[:-1]):
        found.append(earlier + found[-1][:, :1] * to_end)
    return torch.cat(found[::-1], 1)[:, :width]


def rewards_to_go(
    rewards: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], gamma: float = 1.0
) -> Float[Tensor, "N T"]:
    """Discounted sum of the rewards from each decision on, 0 outside the mask."""
    no_value, no_last = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    return generalized_advantages(rewards, no_value, no_last, mask, gamma, 1.0)
