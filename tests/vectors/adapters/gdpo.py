"""GDPO."""

import torch

from polopt.functional.masked import given_to_decisions
from polopt.methods.advantage.gdpo import batch_standardized, conditioned, decoupled_sum, token_standardized
from tests.vectors.adapters.common import Values


def advantage(inputs: Values, params: Values) -> Values:
    """Advantages before and after the batch step."""
    rewards, count = inputs["rewards"].double(), inputs["rewards"].shape[1]
    weights = inputs.get("weights", torch.ones(count)).double()
    policy = params.get("nan_policy", "zero")
    before = decoupled_sum(rewards, inputs["group"], weights, params["eps_group"], policy)
    if params.get("level") == "token":
        mask = inputs["mask"].bool()
        alone = given_to_decisions(before[:, None], mask)
        tokens = alone if count == 1 else token_standardized(before, mask, params["eps_batch"])
        return {"pre_batch": before, "advantage_token": tokens}
    after = before if count == 1 else batch_standardized(before, params["eps_batch"])
    return {"pre_batch": before, "advantage": after}


def gated(inputs: Values, params: Values) -> Values:
    """Advantages of conditioned rewards."""
    rewards = inputs["rewards"].double()
    changed = conditioned(rewards, params["conditioned"], params["condition_on"], params["threshold"])
    return advantage(inputs | {"rewards": changed}, params) | {"conditioned_rewards": changed}


OPERATIONS = {"gdpo_advantage": advantage, "gdpo_conditioned": gated}
