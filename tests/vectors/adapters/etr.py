"""ETR."""

from polopt.batch import Evaluation
from polopt.methods.trust_region.etr import ElasticClip, elastic_scale, group_quality
from tests.vectors.adapters.common import AGGREGATIONS, Values, attach_signals, batch_of, loss_and_gradient


def surrogate(inputs: Values, params: Values) -> Values:
    """Loss, gradient and the widths of each sample."""
    batch, bounds = batch_of(inputs), tuple(params["reward_range"])
    scaling = {name: params[name] for name in ("alpha", "beta", "s_min", "s_max")}
    part = ElasticClip(
        clip_low=params["eps_low"], clip_high=params["eps_high"], reward_range=bounds,
        aggregation=AGGREGATIONS[params["aggregation"]], **scaling,
    )  # fmt: skip
    attach_signals(part, batch)
    quality = group_quality(inputs["rewards"].double(), batch.group, bounds)
    scale = elastic_scale(inputs["advantages"].double(), quality, **scaling)
    return loss_and_gradient(part, batch, inputs["logp"]) | {
        "group_quality": quality,
        "scale": scale,
        "eps_low": scale * params["eps_low"],
        "eps_high": scale * params["eps_high"],
        "clipped": part.clipped(Evaluation(inputs["logp"]), batch) & batch.mask,
    }


OPERATIONS = {None: surrogate}
