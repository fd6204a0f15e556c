"""REAL."""

from polopt.methods.preference.real import RewardsAsLabels
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient


def surrogate(inputs: Values, params: Values) -> Values:
    """Loss and gradient."""
    part = RewardsAsLabels(variant=params["variant"], tau=params["tau"])
    return loss_and_gradient(part, batch_of(inputs), inputs["logp"])


OPERATIONS = {None: surrogate}
