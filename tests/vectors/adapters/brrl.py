"""BRRL: the group form, GBPO."""

from polopt.methods.trust_region.gbpo import BoundedRatio, MeanAndMedian
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
    advantage = MeanAndMedian(eps=params["std_eps"], norm_by_std=params["norm_by_std"])
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


OPERATIONS = {"gbpo": gbpo}
