r"""CoPG - Contrastive Policy Gradient (arXiv 2406.19185, 2024).

Each of two completions of a prompt uses the other's regularised reward as its baseline. The fixed point is the
KL-regularised optimum whatever distribution the completions come from: no importance ratio, no clipping, no critic.
Contains IPO (rewards +-1/4) and, on fresh samples, RLOO with the KL in the reward.

.. math::
    \rho_i = \sum_t m_{it}(\log\pi - \log\pi_{ref})_{it}, \quad R^\pi_{\beta,i} = R_i - \beta\rho_i \tag{1, 2}

.. math::
    \ell(y, y') = \big(\Delta R - \tfrac\beta2 \Delta\rho\big)\Delta\rho, \quad
    \nabla\ell = \big(R^\pi_\beta(y) - R^\pi_\beta(y')\big)(\nabla\ln\pi(y) - \nabla\ln\pi(y')) \tag{3, 4}

.. math::
    L = \mathrm{mean}_{g}\,\mathrm{mean}_{pairs} (-\ell), \qquad
    L_{sq} = \mathrm{mean}_{g} \frac1{k-1}\sum_{i>j} (R^\pi_{\beta,i} - R^\pi_{\beta,j})^2 \tag{5, 6}

The log-ratio is a sum over tokens, never a mean, and rewards are not standardised. The halved temperature in (3) is
what makes plain differentiation give (4). For very off-policy pairs and small beta, clip the gradient norm.

Slots: surrogate; needs `ref_logp`, ignores `old_logp`. Completions that are stored with their scores
train as they are: `polopt train --method copg --stored true --task jsonl:FILE`, with columns `completions` and `scores`.

Use it when completions with scores are already there, from whatever source, and the KL-regularised optimum is wanted. Not
where only which of two is better is known, nor without a KL: beta is the temperature of the optimum.

Pitfalls: never average log-probabilities over tokens and never standardise rewards: either changes the optimum. Small
beta with far off-policy pairs makes targets far away: clip the gradient norm, not the ratio. Sum long completions in
float32 or better.
"""

from typing import Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.functional.masked import masked_sum
from polopt.method import Method
from polopt.methods.classics.rloo import LeaveOneOut
from polopt.methods.preference.pairs import pairs_in_groups
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def contrastive_advantage(
    outcome: Float[Tensor, " N"], rho: Float[Tensor, " N"], group: Int[Tensor, " N"], beta: float
) -> Float[Tensor, " N"]:
    """Equation (5): the regularised reward less the mean of the others'; 0 in a group of one. Constant."""
    regularized = (outcome.double() - beta * rho.double()).detach()
    return regularized - Groups.of(group).leave_one_out_mean(regularized)


def pair_objective(
    reward_gap: Float[Tensor, " M"], rho_gap: Float[Tensor, " M"], beta: float
) -> Float[Tensor, " M"]:
    """Equation (3), to be maximised."""
    return (reward_gap - beta / 2 * rho_gap) * rho_gap


@register("copg")
class ContrastivePairs(Surrogate):
    """Contrastive pair loss, equations (1) to (6)."""

    coupling = "group"
    any_origin = True
    zero_advantage_is_silent = False
    requires = frozenset({"ref_logp"})

    class Config(Settings):
        """Options of the pair loss."""

        beta: float = Field(0.1, ge=0)
        """Temperature of the KL to the reference, in reward units per nat; 0.01 to 0.1."""
        form: Literal["contrastive", "squared"] = "contrastive"
        """Equation (5), or the squared form (6) with the same direction, scaled by beta * k."""

    def loss_weights(self, batch: Batch) -> Float[Tensor, "N T"]:
        """1 on every selected decision: the loss has its own averages."""
        return (batch.weights > 0).to(batch.old_logp)

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        mask = batch.mask & (batch.loss_weight > 0)
        beta = self.config.beta
        rho = masked_sum(evaluation.logp, mask) - masked_sum(batch.ref_logp, mask)
        # a trajectory without decisions has rho = 0 and still takes part with its reward
        i, j, weight, members = pairs_in_groups(
            batch.group, (batch.weights > 0).any(-1) | ~batch.mask.any(-1)
        )
        outcome = batch.outcome().to(rho)
        reward_gap, rho_gap = outcome[i] - outcome[j], rho[i] - rho[j]
        if self.config.form == "contrastive":
            loss = -pair_objective(reward_gap, rho_gap, beta)
        else:
            loss = (reward_gap - beta * rho_gap).square() * members / 2
        return (weight.to(rho) * loss).sum() + 0 * rho.sum()


@register_recipe("copg")
def copg() -> Method:
    """CoPG at beta 0.1."""
    return Method(advantage=LeaveOneOut(), surrogate=ContrastivePairs())
