"""What `orpo_chi2` measures without learning anything (arXiv 2403.03185, equations 1 to 4, 9 and 10).

Divergences between action distributions, between policies over whole responses, and between the occupancy measures of a
table, with what they promise about the true return of a policy that was trained on a proxy reward.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.functional.masked import masked_sum

SampledDivergence = Literal["sqrt_chi2", "chi2", "kl"]
FLOOR = 1e-4
"""The smallest chi^2 that a root is taken of."""


def categorical_chi2(p: Float[Tensor, "*n A"], q: Float[Tensor, "*n A"]) -> Float[Tensor, "*n"]:
    """Equation (9): sum_a (p - q)^2 / q; infinite where p has mass and q none."""
    terms = torch.where(q > 0, (p - q).square() / torch.where(q > 0, q, 1.0), 0.0)
    return terms.sum(-1) + torch.where((q <= 0) & (p > 0), torch.inf, 0.0).sum(-1)


def categorical_kl(p: Float[Tensor, "*n A"], q: Float[Tensor, "*n A"]) -> Float[Tensor, "*n"]:
    """sum_a p ln(p / q) in nats; infinite where p has mass and q none."""
    both = (p > 0) & (q > 0)
    logs = torch.where(both, p, 1.0).log() - torch.where(both, q, 1.0).log()
    return (p * logs).sum(-1) + torch.where((q <= 0) & (p > 0), torch.inf, 0.0).sum(-1)


def gaussian_chi2(
    p_mean: Float[Tensor, "*n D"],
    p_std: Float[Tensor, "*n D"],
    q_mean: Float[Tensor, "*n D"],
    q_std: Float[Tensor, "*n D"],
) -> Float[Tensor, "*n"]:
    """Equation (9) of diagonal Gaussians; infinite where a variance of p is at least twice that of q."""
    gap = 2 * q_std.square() - p_std.square()
    finite = gap > 0
    gap = torch.where(finite, gap, 1.0)
    logs = 2 * q_std.log() - p_std.log() - gap.log() / 2 + (p_mean - q_mean).square() / gap
    return torch.where(finite.all(-1), torch.expm1(logs.sum(-1)), torch.inf)


def beta_chi2(
    p_alpha: Float[Tensor, "*n D"],
    p_beta: Float[Tensor, "*n D"],
    q_alpha: Float[Tensor, "*n D"],
    q_beta: Float[Tensor, "*n D"],
) -> Float[Tensor, "*n"]:
    """Equation (9) of independent Betas; infinite unless 2 p_alpha > q_alpha and 2 p_beta > q_beta."""
    alpha, beta = 2 * p_alpha - q_alpha, 2 * p_beta - q_beta
    finite = (alpha > 0) & (beta > 0)
    mixed = _log_beta(torch.where(finite, alpha, 1.0), torch.where(finite, beta, 1.0))
    logs = mixed - 2 * _log_beta(p_alpha, p_beta) + _log_beta(q_alpha, q_beta)
    return torch.where(finite.all(-1), torch.expm1(logs.sum(-1)), torch.inf)


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)


def action_penalty(
    kl: Float[Tensor, "*n"],
    chi2: Float[Tensor, "*n"],
    kind: SampledDivergence,
    coef: float,
    gamma: float,
    floor: float = FLOOR,
) -> Float[Tensor, ""]:
    """Equation (9) of the states' exact divergences; a chi^2 that is not finite is replaced by the state's KL."""
    finite = chi2.isfinite()
    divergence = torch.where(finite, torch.where(finite, chi2, 0.0), kl)
    if kind == "kl":
        divergence = kl
    elif kind == "sqrt_chi2":
        divergence = divergence.clamp(min=floor).sqrt()
    return coef / (1 - gamma) * divergence.mean()


def exp_linear(x: Float[Tensor, "*n"], bound: float = 10.0) -> Float[Tensor, "*n"]:
    """exp(x), continued by its tangent above `bound` nats."""
    near = x.clamp(max=bound).exp()
    return torch.where(x > bound, near * (1 + x - bound), near)


class SequenceDivergence(NamedTuple):
    """Equation (10) and what is beyond its bound: shares of the responses."""

    kl: Tensor
    chi2: Tensor
    clipped: Tensor
    inverse_clipped: Tensor


def sequence_divergence(
    logp: Float[Tensor, "N T"],
    ref_logp: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    bound: float = 10.0,
    weights: Float[Tensor, " N"] | None = None,
) -> SequenceDivergence:
    """Equation (10) of whole responses, in float64; `weights` of the responses in the means, all equal if not given."""
    rho = sequence_log_ratio(logp, ref_logp, mask)
    weights = torch.ones_like(rho) if weights is None else weights.to(rho)

    def mean(values: Tensor) -> Tensor:
        return (weights * values).sum() / weights.sum().clamp(min=torch.finfo(rho.dtype).tiny)

    up, down = exp_linear(rho, bound), exp_linear(-rho, bound)
    return SequenceDivergence(
        mean(rho + down - 1), mean(up + down - 2), mean((rho > bound) * 1.0), mean((-rho > bound) * 1.0)
    )


def sequence_log_ratio(
    logp: Float[Tensor, "N T"], ref_logp: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, " N"]:
    """rho of equation (10): log-ratio of each whole response in nats, in float64; `ref_logp` is constant."""
    return masked_sum(logp.double(), mask) - masked_sum(ref_logp.detach().double(), mask)


def sampled_penalty(
    kl: Float[Tensor, ""], chi2: Float[Tensor, ""], kind: SampledDivergence, floor: float = FLOOR
) -> Float[Tensor, ""]:
    """The divergence that is paid for, of its estimates."""
    match kind:
        case "kl":
            return kl
        case "chi2":
            return chi2
        case "sqrt_chi2":
            return chi2.clamp(min=floor).sqrt()


def occupancy_measure(
    transitions: Float[Tensor, "S A S"],
    initial: Float[Tensor, " S"],
    policy: Float[Tensor, "S A"],
    gamma: float,
) -> Float[Tensor, "S A"]:
    """Equation (1): discounted share of the time spent in each state and action; sums to 1. Differentiable."""
    moved = torch.einsum("sa,sat->st", policy, transitions)
    identity = torch.eye(len(initial), dtype=policy.dtype, device=policy.device)
    states = (1 - gamma) * torch.linalg.solve(identity - gamma * moved.T, initial)
    return states[:, None] * policy


class HackingBound(NamedTuple):
    """What a proxy reward promises about the true reward; returns are averages per step."""

    chi2: Tensor
    """Between the occupancy measures; infinite where the reference never goes."""
    proxy_return: Tensor
    true_return: Tensor
    reference_return: Tensor
    """True return of the reference."""
    correlation: Tensor
    proxy_std: Tensor
    coef: Tensor
    """lambda of equation (4)."""
    bound: Tensor
    """Least true return by equation (3); minus infinity if the correlation is not positive."""


def proxy_correlation(
    reference: Float[Tensor, "S A"], reward: Float[Tensor, "S A"], proxy: Float[Tensor, "S A"]
) -> Float[Tensor, ""]:
    """Equation (1): correlation of the rewards under the reference's occupancy measure; NaN if one is constant."""
    true_gap, proxy_gap = (r - (reference * r).sum() for r in (reward, proxy))
    return (reference * true_gap * proxy_gap).sum() / (_std(reference, reward) * _std(reference, proxy))


def _std(reference: Tensor, reward: Tensor) -> Tensor:
    return (reference * (reward - (reference * reward).sum()).square()).sum().sqrt()


def hacking_lower_bound(
    occupancy: Float[Tensor, "S A"],
    reference: Float[Tensor, "S A"],
    reward: Float[Tensor, "S A"],
    proxy: Float[Tensor, "S A"],
) -> HackingBound:
    """Equations (1) to (4) of two occupancy measures."""
    true_std, proxy_std = _std(reference, reward), _std(reference, proxy)
    r = proxy_correlation(reference, reward, proxy)
    residual = (1 - r.square()).clamp(min=0)
    chi2 = categorical_chi2(occupancy.flatten(), reference.flatten())
    true_return, proxy_return = (occupancy * reward).sum(), (occupancy * proxy).sum()
    reference_return = (reference * reward).sum()
    gain = (proxy_return - (reference * proxy).sum()) / proxy_std
    cost = torch.where(residual > 0, (residual * chi2).sqrt(), 0.0)
    bound = torch.where(r > 0, reference_return + true_std * (gain - cost) / r, -torch.inf)
    return HackingBound(
        chi2, proxy_return, true_return, reference_return, r, proxy_std, proxy_std * residual.sqrt(), bound
    )
