"""SubPO."""

from typing import Any

import torch
from torch import Tensor

from polopt.functional.submodular import (
    InformationGain,
    ItemCollection,
    SetFunction,
    WeightedCoverage,
    marginal_gains,
    membership,
)
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.gradient.sub_po import GainsToGo, gains_to_go
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient, set_advantages


def rows(lists: Any) -> list[Any]:
    """Lists of indices, whether they arrive as a tensor or as they are."""
    return lists.tolist() if isinstance(lists, Tensor) else lists


def coverage(inputs: Values, params: Values) -> SetFunction:
    """Weighted coverage."""
    covers = rows(inputs["cover"])
    weights = inputs.get("item_weights")
    items = 1 + max(max(row, default=-1) for row in covers) if weights is None else len(weights)
    return WeightedCoverage(membership(covers, items), weights)


def information(inputs: Values, params: Values) -> SetFunction:
    """Information gain."""
    return InformationGain(inputs["prior_cov"], params["noise_variance"])


def items(inputs: Values, params: Values) -> SetFunction:
    """Item collection."""
    groups = rows(inputs["groups"])
    sites = 1 + max(int(inputs["paths"].max()), *(max(row, default=0) for row in groups))
    return ItemCollection(membership(groups, sites), inputs["demand"])


def estimator(function: Any) -> Any:
    """The operation with a set function."""

    def run(inputs: Values, params: Values) -> Values:
        inputs = inputs | {"paths": inputs["paths"].nan_to_num(-1).long()}
        chosen = function(inputs, params)
        prefix = chosen.prefix_values(inputs["paths"])
        batch, discount = batch_of(inputs), float(params.get("discount", 1.0))
        batch.step_rewards = marginal_gains(prefix)
        part = GainsToGo(discount=discount, baseline=params.get("baseline") or "none")
        set_advantages(batch, part(batch))
        surrogate = ScoreFunction(aggregation="sequence_mean_token_sum")
        return {
            "F_prefix": prefix,
            "modular_reward": torch.stack([chosen.single_values(p) for p in inputs["paths"][:, 1:]]),
            "marginal_gain": batch.step_rewards,
            "togo": gains_to_go(batch.step_rewards, batch.mask, discount),
            "advantage": batch.advantages,
        } | loss_and_gradient(surrogate, batch, inputs["logp"].double())

    return run


OPERATIONS = {
    "weighted_coverage": estimator(coverage),
    "information_gain": estimator(information),
    "item_collection": estimator(items),
}
