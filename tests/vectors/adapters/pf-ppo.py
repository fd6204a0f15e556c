"""PF-PPO."""

from torch import Tensor

from polopt.functional.groups import Groups
from polopt.methods.allocation.pf_ppo import filter_weights, r_squared
from polopt.methods.classics.ppo import PPOClip
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient


def weights(inputs: Values, params: Values) -> Values:
    """Selection probabilities."""
    return {"weight": probabilities(inputs, params)}


def probabilities(inputs: Values, params: Values) -> Tensor:
    """By the strategy and its power, if there is one."""
    options = {"power": params["power"]} if "power" in params else {}
    return filter_weights(inputs["rewards"].double(), inputs["group"], params["strategy"], **options)


def diagnostic(inputs: Values, params: Values) -> Values:
    """R^2 between rewards and scores."""
    found = r_squared(inputs["rewards"], inputs["scores"], inputs["weight"], params["bins"])
    return {"r2": found.r2, "bin_reward": found.reward, "bin_score": found.score}


def expected_loss(inputs: Values, params: Values) -> Values:
    """Clipped loss with every sequence weighted by its probability."""
    batch = batch_of(inputs)
    groups = Groups.of(batch.group)
    probability = probabilities(inputs, params)
    batch.weights = (probability * groups.broadcast(groups.size))[:, None] * batch.mask
    part = PPOClip(aggregation="group_mean", clip_low=params["clip"], clip_high=params["clip"])
    return loss_and_gradient(part, batch, inputs["logp"]) | {"weight": probability}


OPERATIONS = {"weights": weights, "r_squared": diagnostic, "expected_loss": expected_loss}
