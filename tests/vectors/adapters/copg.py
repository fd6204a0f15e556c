"""CoPG."""

from polopt.functional.masked import masked_sum
from polopt.methods.preference.copg import ContrastivePairs, contrastive_advantage
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient


def surrogate(inputs: Values, params: Values) -> Values:
    """Loss, gradient, regularised reward and its leave-one-out advantage."""
    batch, beta = batch_of(inputs), params["beta"]
    rho = masked_sum(inputs["logp"] - batch.ref_logp, batch.mask)
    return loss_and_gradient(ContrastivePairs(beta=beta), batch, inputs["logp"]) | {
        "regularized_reward": batch.outcome() - beta * rho,
        "advantage": contrastive_advantage(batch.outcome(), rho, batch.group, beta),
    }


OPERATIONS = {None: surrogate}
