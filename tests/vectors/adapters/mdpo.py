"""MDPO: tabular step, on-policy losses, off-policy losses, Tsallis logarithm."""

import torch
from torch import Tensor
from torch.distributions import Normal

from polopt.batch import Evaluation
from polopt.functional.divergence import categorical_kl, gaussian_kl
from polopt.methods.classics.sac import soft_q_target, soft_value_target
from polopt.methods.trust_region.mdpo import (
    MirrorDescent,
    mirror_step,
    soft_policy_loss,
    tsallis_log,
)
from tests.vectors.adapters.common import AGGREGATIONS, Values, batch_of, loss_and_gradient


def tabular(inputs: Values, params: Values) -> Values:
    """The exact step."""
    found = mirror_step(inputs["pi"].double(), inputs["advantages"].double(), params["t"])
    return {"pi_next": found.policy, "kl_next_to_pi": found.kl, "objective": found.objective}


def on_distributions(inputs: Values, params: Values, logp: Tensor, old_logp: Tensor, kl: Tensor) -> Values:
    """The exact-KL loss of one decision in each state."""
    rows = {"logp": logp[:, None], "old_logp": old_logp[:, None], "mask": torch.ones(len(logp), 1)}
    batch = batch_of(rows | {"advantages": inputs["advantages"].double()})
    part = MirrorDescent(kl="exact", schedule="constant", step=params["t"])
    batch.loss_weight = part.loss_weights(batch)
    return {"loss": part(Evaluation(logp[:, None], kl=kl[:, None]), batch), "kl": kl.mean()}


def gradients(found: Values, **leaves: Tensor) -> Values:
    """What was found, and the derivative of its loss with respect to each leaf."""
    taken = torch.autograd.grad(found["loss"], list(leaves.values()))
    return {k: v.detach() for k, v in found.items()} | {
        f"grad_{name}": gradient for name, gradient in zip(leaves, taken, strict=True)
    }


def categorical(inputs: Values, params: Values) -> Values:
    """Loss, KL and gradient with respect to the logits."""
    logits, old = inputs["logits"].double().requires_grad_(), inputs["old_logits"].double()
    action = inputs["actions"].long()[:, None]
    logp, old_logp = (x.log_softmax(-1).gather(-1, action)[:, 0] for x in (logits, old))
    found = on_distributions(inputs, params, logp, old_logp, categorical_kl(logits, old))
    return gradients(found, logits=logits)


def gaussian(inputs: Values, params: Values) -> Values:
    """Loss, KL and gradients with respect to mean and log standard deviation."""
    mean, log_std = (inputs[name].double().requires_grad_() for name in ("mean", "log_std"))
    old_mean, old_log_std = inputs["old_mean"].double(), inputs["old_log_std"].double()
    actions = inputs["actions"].double()
    logp = Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    old_logp = Normal(old_mean, old_log_std.exp()).log_prob(actions).sum(-1)
    kl = gaussian_kl(mean, log_std, old_mean, old_log_std)
    return gradients(on_distributions(inputs, params, logp, old_logp, kl), mean=mean, log_std=log_std)


def tokens(inputs: Values, params: Values) -> Values:
    """The sampled form."""
    part = MirrorDescent(
        schedule="constant", step=params["t"], log_ratio_bound=params.get("log_ratio_clamp", 20.0),
        aggregation=AGGREGATIONS[params.get("aggregation", "token-mean")],
    )  # fmt: skip
    return loss_and_gradient(part, batch_of(inputs), inputs["logp"])


def off_policy(inputs: Values, params: Values) -> Values:
    """Policy loss with its partial gradients, and the targets of the critics."""
    leaves = {name: inputs[name].double().requires_grad_() for name in ("logp", "old_logp", "q1")}
    loss = soft_policy_loss(**leaves, temperature=params["lam"], inverse_step=params["inv_t"]).mean()
    found = gradients({"loss": loss}, **leaves)
    logp, q1 = leaves["logp"], leaves["q1"]
    found |= {
        "policy_loss": found["loss"],
        "v_target": soft_value_target(q1, inputs["q2"].double(), logp, params["lam"]),
    }
    if "next_value" in inputs:
        found["q_target"] = soft_q_target(
            inputs["rewards"], inputs["done"].double(), inputs["next_value"], params["gamma"]
        )
    return found


def logarithm(inputs: Values, params: Values) -> Values:
    """log_q."""
    return {"log_q": tsallis_log(inputs["x"].double(), params["q"])}


OPERATIONS = {
    "tabular_step": tabular,
    "onpolicy_categorical": categorical,
    "onpolicy_gaussian": gaussian,
    "onpolicy_tokens": tokens,
    "offpolicy": off_policy,
    "tsallis_log": logarithm,
}
