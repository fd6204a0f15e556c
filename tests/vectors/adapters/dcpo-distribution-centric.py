"""DCPO."""

import torch

from polopt.methods.classics.grpo import group_standardized
from polopt.methods.classics.ppo import PPOClip
from polopt.methods.entropy.dcpo import DistributionCentric, mixing_weight
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient, masked, set_advantages


def method(inputs: Values, params: Values) -> Values:
    """Controller, mixed advantages, loss and gradient."""
    batch = batch_of(inputs)
    names = ("target_entropy", "temperature_high", "temperature_low", "alpha_cap", "positive_threshold")
    part = DistributionCentric(**{name: params[name] for name in names})
    part.previous_entropy.fill_(float(inputs["previous_entropy"]))
    batch.set_signal("old_tempered_logp", inputs["old_logp_tempered"])
    base = group_standardized(batch.outcome(), batch.group, params["std_eps"])[:, None].expand(
        batch.mask.shape
    )
    set_advantages(batch, part(batch, masked(base, batch)))
    success = (batch.outcome() > params["positive_threshold"]).double().mean()
    surrogate = PPOClip(
        clip_low=params["clip_low"], clip_high=params["clip_high"], dual_clip=params["clip_dual"]
    )
    return loss_and_gradient(surrogate, batch, inputs["logp"]) | {
        "temperature": torch.tensor(part.temperature),
        "alpha": mixing_weight(part.previous_entropy, params["target_entropy"], success, params["alpha_cap"]),
        "advantages": batch.advantages,
    }


OPERATIONS = {None: method}
