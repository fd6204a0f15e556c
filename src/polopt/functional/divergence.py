"""KL divergences: of whole distributions, and estimated from one sample.

One-sample estimators of KL(pi || pi_ref) from log-probabilities of the decisions taken (Schulman, 2020).

With x = log pi_ref(a|s) - log pi(a|s) and a drawn from pi:
k1 = -x (unbiased, may be negative), k2 = x^2 / 2 (biased, low variance, right gradient), k3 = e^x - 1 - x (unbiased,
>= 0). As a loss, k1 has zero expected gradient on policy; use k2 or k3 there.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.functional.masked import zero_outside
from polopt.functional.ratio import LOG_RATIO_BOUND

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logp: Float[Tensor, "N T"],
    ref_logp: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    estimator: Estimator = "k3",
) -> Float[Tensor, "N T"]:
    """KL estimate of each decision in nats, 0 outside the mask. `ref_logp` is constant for the gradient."""
    x = (zero_outside(ref_logp.detach(), mask) - zero_outside(logp, mask)).clamp(
        -LOG_RATIO_BOUND, LOG_RATIO_BOUND
    )
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "k3":
            return torch.expm1(x) - x
    raise ValueError(f"estimator: {estimator!r} is not one of k1, k2, k3")


def categorical_kl(logits: Float[Tensor, "*S A"], old_logits: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
    """KL(new || old) in nats of categorical distributions; `old_logits` are constant."""
    logp, old_logp = logits.log_softmax(-1), old_logits.detach().log_softmax(-1)
    return (logp.exp() * (logp - old_logp)).sum(-1)


def gaussian_kl(
    mean: Float[Tensor, "*S D"],
    log_std: Float[Tensor, "*#S D"],
    old_mean: Float[Tensor, "*S D"],
    old_log_std: Float[Tensor, "*#S D"],
) -> Float[Tensor, "*S"]:
    """KL(new || old) in nats of diagonal Gaussians; the old ones are constant."""
    old_mean, old_log_std = old_mean.detach(), old_log_std.detach()
    change = log_std - old_log_std
    distance = (mean - old_mean).square() / (2 * (2 * old_log_std).exp())
    return ((2 * change).expm1() / 2 - change + distance).sum(-1)
