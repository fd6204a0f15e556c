"""MHPO."""

from polopt.functional.ratio import log_ratio
from polopt.methods.trust_region.mhpo import ModulatedHazard, modulate
from tests.vectors.adapters.common import AGGREGATIONS, Values, batch_of, loss_and_gradient, masked


def surrogate(inputs: Values, params: Values) -> Values:
    """Loss, gradient and the modulation of each token."""
    batch = batch_of(inputs)
    options = {
        name: params[name] for name in ("c", "k_pos", "lambda_pos", "k_neg", "lambda_neg", "use_hazard")
    }
    found = modulate(log_ratio(inputs["logp"], batch.old_logp, batch.mask), **options)
    part = ModulatedHazard(aggregation=AGGREGATIONS[params["aggregation"]], **options)
    return loss_and_gradient(part, batch, inputs["logp"]) | {
        name: masked(value, batch) for name, value in found._asdict().items()
    }


OPERATIONS = {None: surrogate}
