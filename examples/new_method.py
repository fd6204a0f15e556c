"""Soft trust region: a smooth stand-in for PPO's clip, in forty lines.

    loss_t = -A_t r_t + kappa |A_t| (r_t - 1)^2 / 2

Each decision is pulled back towards a ratio of 1, the harder the further it has moved; no edge, no dead zone.
"""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import polopt
from polopt.batch import Batch, Evaluation
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate


def soft_trust_loss(
    ratio: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], kappa: float
) -> Float[Tensor, "N T"]:
    """-A r + kappa |A| (r - 1)^2 / 2: the policy gradient with a brake that grows with the step."""
    return -advantages * ratio + kappa * advantages.abs() * (ratio - 1).square() / 2


@polopt.register("soft_trust")
class SoftTrust(Surrogate):
    """The surrogate above; everything else of the run stays as it is."""

    class Config(Surrogate.Config):
        """Options of the soft trust region."""

        kappa: float = Field(5.0, ge=0)
        """Strength of the brake; the best ratio is 1 + sign(A) / kappa."""

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return soft_trust_loss(ratio, batch.advantages, self.config.kappa)


@polopt.register_recipe("soft_trust")
def soft_trust() -> Method:
    """GRPO's advantages under the soft trust region, four updates per rollout."""
    return Method(advantage=GroupStandardized(), surrogate=SoftTrust(), defaults={"minibatches": 4})
