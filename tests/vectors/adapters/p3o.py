"""P3O."""

import torch

from polopt.methods.classics.kl import KLReward
from polopt.methods.preference.p3o import PairwiseProximal
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient


def surrogate(inputs: Values, params: Values) -> Values:
    """Loss, gradient and the reward after the KL penalty."""
    batch = batch_of(inputs)
    if params["kl_in_reward_beta"]:
        penalty = KLReward(coef=params["kl_in_reward_beta"], estimator="k1")
        batch = penalty(batch, lambda stream: torch.Generator())
    part = PairwiseProximal(variant=params["variant"], clip=params["clip_eps"])
    return loss_and_gradient(part, batch, inputs["logp"]) | {"effective_reward": batch.outcome()}


OPERATIONS = {None: surrogate}
