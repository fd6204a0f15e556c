"""What a loss averages: the share of each decision, fixed before the loss is taken.

loss = sum over decisions of `loss_weight * decision_loss`. The modes, with m the mask, w the selection weights, L_i the
decisions of trajectory i, N the trajectories and P the groups that count:

    token_mean               w m / sum(m)                 every decision weighs the same (DAPO)
    sequence_mean            w m / (L_i N)                mean inside each trajectory, then over trajectories (GRPO)
    sequence_mean_token_sum  w m / N                      sum inside each trajectory, then mean (REINFORCE, RLOO)
    constant                 w m / (C N)                  the same over a constant length C (Dr. GRPO)
    group_mean               w m / (L_i G_g P)            sequence_mean inside each group, then over groups

A trajectory without decisions is left out of every count. With `denominator="selected"` decisions of weight 0 are left
out of the counts too, and with them trajectories that have no others; with "selected_decisions" such trajectories still
count in N; with "all" selection shrinks the loss instead of re-normalising it.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.functional.groups import Groups

Aggregation = Literal["token_mean", "sequence_mean", "sequence_mean_token_sum", "constant", "group_mean"]
Denominator = Literal["all", "selected", "selected_decisions"]


def aggregation_weights(
    mask: Bool[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    group: Int[Tensor, " N"],
    aggregation: Aggregation,
    denominator: Denominator = "all",
    constant: float | None = None,
) -> Float[Tensor, "N T"]:
    """The share of each decision in the loss of this minibatch.

    Args:
        mask: decisions that count.
        weights: selection weights, >= 0.
        group: group ids, for `group_mean`.
        aggregation: one of the modes above.
        denominator: what the counts are taken over.
        constant: C in decisions, for `constant`; the longest trajectory's if None.

    Raises:
        ValueError: unknown aggregation.
    """
    counted = mask if denominator == "all" else mask & (weights > 0)
    share = torch.where(mask, weights, torch.zeros_like(weights))
    if aggregation == "token_mean":
        return share / counted.count_nonzero().clamp(min=1)
    length = counted.sum(-1, keepdim=True).to(share.dtype)
    present = (counted if denominator == "selected" else mask).any(-1)
    rows = present.sum().clamp(min=1)
    match aggregation:
        case "sequence_mean":
            return share / (length.clamp(min=1) * rows)
        case "sequence_mean_token_sum":
            return share / rows
        case "constant":
            return share / (rows * (constant or _longest(mask)))
        case "group_mean":
            groups = Groups.of(group)
            members = groups.sum(present.to(share.dtype)).to(share.dtype)
            per_group = members.clamp(min=1) * (members > 0).sum().clamp(min=1)
            return share / (length.clamp(min=1) * groups.broadcast(per_group)[:, None])
    raise ValueError(f"aggregation: {aggregation!r} is not one of {', '.join(get_args(Aggregation))}")


def _longest(mask: Bool[Tensor, "N T"]) -> int:
    return max(1, int(mask.sum(-1).max())) if mask.numel() else 1
