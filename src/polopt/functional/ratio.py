"""Importance ratios between the current policy and the one that made the data."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.functional.masked import row_mean, zero_outside

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to this many nats either way, so that no exponential overflows in float32."""


def log_ratio(
    logp: Float[Tensor, "N T"],
    old_logp: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    bound: float = LOG_RATIO_BOUND,
) -> Float[Tensor, "N T"]:
    """log pi(a|s) - log pi_old(a|s) in nats, clamped to [-bound, bound]; 0 outside the mask. `old_logp` is constant."""
    return zero_outside(logp - old_logp.detach(), mask).clamp(-bound, bound)


def sequence_log_ratio(
    logp: Float[Tensor, "N T"],
    old_logp: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    bound: float = LOG_RATIO_BOUND,
) -> Float[Tensor, "N 1"]:
    """Length-normalised log-ratio of each trajectory: the mean over its decisions (GSPO, arXiv 2507.18071, eq. 7)."""
    return row_mean(logp - old_logp.detach(), mask).clamp(-bound, bound)[:, None]


def clipped_surrogate(
    ratio: Float[Tensor, "N T"],
    advantages: Float[Tensor, "N T"],
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "N T"]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)): the PPO loss of each decision (arXiv 1707.06347, eq. 7).

    Written as -A clip(r) with the one bound that acts: the upper one where A > 0, the lower one where A < 0.
    """
    low, high = (
        torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device)
        for bound in (1 - clip_low, 1 + clip_high)
    )
    below = torch.where(advantages < 0, low, -torch.inf)
    above = torch.where(advantages > 0, high, torch.inf)
    return -advantages * ratio.clamp(below, above)


def dual_clipped(
    loss: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], dual_clip: float | None
) -> Float[Tensor, "N T"]:
    """`loss`, where A < 0 at most -A * dual_clip (arXiv 1912.09729, eq. 5); as it is if `dual_clip` is None."""
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
