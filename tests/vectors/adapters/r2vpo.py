"""R2VPO."""

from polopt.batch import Evaluation
from polopt.functional.masked import masked_mean
from polopt.functional.ratio import log_ratio
from polopt.methods.trust_region.r2vpo import RatioVariance, effective_weight
from tests.vectors.adapters.common import AGGREGATIONS, Values, batch_of, loss_and_gradient, masked


def surrogate(inputs: Values, params: Values) -> Values:
    """Loss, gradient, ratio variance and the multiplier after the step."""
    batch = batch_of(inputs)
    options = {name: params[name] for name in ("lam", "delta", "eta_lambda")}
    part = RatioVariance(aggregation=AGGREGATIONS[params.get("aggregation", "token-mean")], **options)
    found = loss_and_gradient(part, batch, inputs["logp"])
    ratio = log_ratio(inputs["logp"], batch.old_logp, batch.mask).exp()
    part.after_step(Evaluation(inputs["logp"]), batch)
    return found | {
        "ratio_variance": masked_mean((ratio - 1).square(), batch.mask),
        "effective_weight": masked(effective_weight(ratio, batch.advantages, params["lam"]), batch),
        "lam_next": part.multiplier,
    }


OPERATIONS = {None: surrogate}
