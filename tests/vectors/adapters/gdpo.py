"""GDPO."""

import torch

from polopt.methods.advantage.gdpo import batch_standardized, conditioned, decoupled_sum, token_standardized
from tests.vectors.adapters.common import Values


def advantage(inputs: Values, params: Values) -> Values:
    """Advantages before and after the batch step."""
    rewards, count = inputs["rewards"].double(), inputs["rewards"].shape[1]
    weights = inputs.get("weights", torch.ones(count)).double()
    before = decoupled_sum(rewards, inputs["group"], weights, params["eps_group"])
    if params.get("level") == "token":
        tokens = token_standardized(before, inputs["mask"].bool(), params["eps_batch"])
        return {"pre_batch": before, "advantage_token": tokens}
    after = before if count == 1 else batch_standardized(before, params["eps_batch"])
    return {"pre_batch": before, "advantage": after}


def gated(inputs: Values, params: Values) -> Values:
    """Advantages of conditioned rewards."""
    rewards = inputs["rewards"].double()
    changed = conditioned(rewards, params["conditioned"], params["condition_on"], params["threshold"])
    return advantage(inputs | {"rewards": changed}, params) | {"conditioned_rewards": changed}


OPERATIONS = {"gdpo_advantage": advantage, "gdpo_conditioned": gated}
