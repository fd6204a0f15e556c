"""BRRL: the group form GBPO, the critic's form BPO and the closed form."""

import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.methods.classics.ppo import ValueLoss
from polopt.methods.trust_region.bpo import CriticBoundedRatio, MedianLoss, bounded_ratio_optimum
from polopt.methods.trust_region.gbpo import BoundedRatio, MeanAndMedian
from polopt.parts import Part
from tests.vectors.adapters.common import (
    AGGREGATIONS,
    Values,
    attach_signals,
    batch_of,
    loss_and_gradient,
    masked,
    set_advantages,
)  # fmt: skip


def gbpo(inputs: Values, params: Values) -> Values:
    """Both advantages, target ratio, loss and gradient."""
    batch = batch_of(inputs)
    advantage = MeanAndMedian(eps=params["std_eps"], norm_by_std=params["norm_by_std"], singletons="reward")
    set_advantages(batch, advantage(batch))
    attach_signals(advantage, batch)
    part = BoundedRatio(
        width_low=params["clip_low"], width_high=params["clip_high"], tau=params["temperature"],
        aggregation=AGGREGATIONS[params["aggregation"]],
    )  # fmt: skip
    target = batch.signal("target_advantages")[:, None].expand(batch.mask.shape) / params["temperature"]
    return loss_and_gradient(part, batch, inputs["logp"]) | {
        "advantages": batch.advantages,
        "target_advantages": masked(target, batch),
        "target_ratio": masked(part.target(batch).expand(batch.mask.shape), batch),
    }


def bpo(inputs: Values, params: Values) -> Values:
    """Target, and the losses of policy, value and median with their gradients; one decision in each row."""
    flat = {name: value.double()[:, None] for name, value in inputs.items()}
    batch = batch_of(
        {"logp": flat["logp"], "old_logp": flat["old_logp"], "mask": torch.ones_like(flat["logp"])}
    )
    batch.set_signal("returns", flat["returns"])
    batch.old_value = flat["values"]
    surrogate = CriticBoundedRatio(
        width_low=params["epsilon"], width_high=params["epsilon"], lam=params["lam"],
        use_median=params["use_median"], argument_bound=params.get("argument_bound"),
    )  # fmt: skip
    batch.loss_weight = surrogate.loss_weights(batch)
    heads = {"logp": flat["logp"], "value": flat["values"], "median": flat["median_values"]}
    policy_loss, grad_logp = derivative(surrogate, heads, "logp", batch)
    value_loss, grad_values = derivative(ValueLoss(coef=2.0), heads, "value", batch)
    coef = float(params["use_median"])
    median = MedianLoss(coef=coef, scale=params.get("median_scale", 1.0))
    median_loss, grad_median_values = derivative(median, heads, "median", batch)
    return {
        "target_ratio": surrogate.target(Evaluation(**heads), batch)[:, 0],
        "policy_loss": policy_loss, "grad_logp": grad_logp, "value_loss": value_loss,
        "grad_values": grad_values, "median_loss": median_loss, "grad_median_values": grad_median_values,
    }  # fmt: skip


def derivative(part: Part, heads: Values, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of a part and its derivative [B] with respect to one field of the evaluation."""
    leaf = heads[name].clone().requires_grad_()
    loss = part(Evaluation(**heads | {name: leaf}), batch)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0][:, 0]


def closed_form(inputs: Values, params: Values) -> Values:
    """Normaliser, ratio, policy and gain."""
    policy, q = inputs["pi0"].double(), inputs["Q"].double()
    found = bounded_ratio_optimum(policy, q, params["lam"], params["c_low"], params["c_high"])
    return {"mu": found.mu, "ratio": found.ratio, "pi_star": found.policy, "surrogate_gain": found.gain}


OPERATIONS = {"gbpo": gbpo, "bpo": bpo, "closed_form": closed_form}
