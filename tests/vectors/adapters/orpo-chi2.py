"""Occupancy ORPO."""

import math
from typing import Any

import torch
from torch import Tensor

from polopt.methods.preference.orpo_discriminator import (
    discriminator_loss,
    divergence_estimate,
    occupancy_penalty,
)
from polopt.methods.preference.orpo_divergences import (
    beta_chi2,
    categorical_chi2,
    gaussian_chi2,
    hacking_lower_bound,
    occupancy_measure,
    sampled_penalty,
    sequence_divergence,
)
from tests.vectors.adapters.common import Values

DISTRIBUTIONS = {
    "categorical": (categorical_chi2, ("probs",)),
    "gaussian": (gaussian_chi2, ("mean", "std")),
    "beta": (beta_chi2, ("alpha", "beta")),
}


def augmentation(inputs: Values, params: Values) -> Values:
    """Penalty of each step, the reward with it, and the estimates of the divergence."""
    scores, kind, trim = inputs["scores"].double(), params["kind"], params.get("trim_fraction", 0.01)
    penalty = occupancy_penalty(scores, kind, params["coeff"], params["reward_clip"], trim)
    name = "chi2" if kind == "sqrt_chi2" else kind
    return {
        "penalty_reward": penalty,
        "augmented_rewards": inputs["rewards"] + penalty,
        f"estimate_{name}": divergence_estimate(scores, kind),
        f"estimate_{name}_trimmed": divergence_estimate(scores, kind, trim),
    }


def discriminator(inputs: Values, params: Values) -> Values:
    """Loss and its derivatives with respect to the scores."""
    leaves = [inputs[name].double().requires_grad_() for name in ("scores_cur", "scores_ref")]
    loss = discriminator_loss(*leaves, kind=params["kind"])
    current, reference = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), "grad_cur": current, "grad_ref": reference}


def action_divergence(inputs: Values, params: Values) -> Values:
    """chi^2 of each state, NaN where it is not finite."""
    function, names = DISTRIBUTIONS[params["distribution"]]
    found = function(*(inputs[f"{policy}_{name}"].double() for policy in "pq" for name in names))
    return {"chi2": torch.where(found.isfinite(), found, torch.nan)}


def sequences(inputs: Values, params: Values) -> Values:
    """Loss, gradient, estimates and shares beyond the bound."""
    leaf = inputs["logp"].double().requires_grad_()
    bound, floor = params.get("log_ratio_clip", 10.0), params.get("chi2_floor", 1e-4)
    found = sequence_divergence(leaf, inputs["ref_logp"].double(), inputs["mask"].bool(), bound)
    loss = params["weight"] * sampled_penalty(found.kl, found.chi2, params["kind"], floor)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {
        "loss": loss.detach(),
        "grad_logp": gradient,
        "kl_hat": found.kl.detach(),
        "chi2_hat": found.chi2.detach(),
        "ratio_clipfrac": found.clipped,
        "inv_ratio_clipfrac": found.inverse_clipped,
    }


def table(inputs: Values, params: Values) -> Values:
    """Occupancy measures, and what the theorem says of them."""
    names = ("P", "rho0", "pi", "pi_ref", "true_reward", "proxy_reward")
    transitions, initial, policy, reference, reward, proxy = (inputs[name].double() for name in names)
    current, anchor = (
        occupancy_measure(transitions, initial, p, params["gamma"]) for p in (policy, reference)
    )
    found = hacking_lower_bound(current, anchor, reward, proxy)
    scalars = {
        "chi2": found.chi2,
        "J_proxy": found.proxy_return,
        "J_true": found.true_return,
        "J_true_ref": found.reference_return,
        "correlation": found.correlation,
        "sigma_proxy_ref": found.proxy_std,
        "lambda_theory": found.coef,
        "true_return_lower_bound": found.bound,
    }
    return {"mu_pi": current, "mu_ref": anchor} | {name: finite(value) for name, value in scalars.items()}


def finite(value: Tensor) -> Any:
    """None if it is not finite."""
    return float(value) if math.isfinite(value) else None


OPERATIONS = {
    "occupancy-divergence": augmentation,
    "discriminator": discriminator,
    "per-state": action_divergence,
    "sequence-level": sequences,
    "tabular": table,
}
