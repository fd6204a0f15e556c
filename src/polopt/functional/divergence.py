"""One-sample estimators of KL(pi || pi_ref) from log-probabilities of the decisions taken (Schulman, 2020).

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
