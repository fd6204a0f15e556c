"""Reductions over the decisions that count. What lies outside the mask never enters, not even as NaN."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def zero_outside(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`values` where `mask`, 0 elsewhere; no gradient flows to what is masked, whatever it is."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def given_to_decisions(values: Float[Tensor, "N 1"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The value of each trajectory where `mask`, 0 elsewhere."""
    if not bool(values.isfinite().all()):
        return zero_outside(values.expand(mask.shape), mask)
    # a product with bytes is several times faster than a choice, and for finite values the same
    return mask.view(torch.int8).to(values.dtype).mul_(values)


def masked_sum(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, " N"]:
    """Sum over the decisions of each trajectory."""
    return zero_outside(values, mask).sum(-1)


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over all decisions that count; 0 if none does."""
    return zero_outside(values, mask).sum() / mask.sum().clamp(min=1)


def row_mean(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, " N"]:
    """Mean over the decisions of each trajectory; 0 for a trajectory without any."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def standardize(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """(values - mean) / (biased std + eps) over all decisions that count, 0 elsewhere; exactly 0 if all are equal."""
    if not bool(mask.any()):
        return torch.zeros_like(values)
    shifted = zero_outside(values - values[mask].min(), mask)
    centred = zero_outside(shifted - masked_mean(shifted, mask), mask)
    return centred / (masked_mean(centred.square(), mask).sqrt() + eps)
