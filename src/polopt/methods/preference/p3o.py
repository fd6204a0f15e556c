r"""P3O - Pairwise Proximal Policy Optimization (arXiv 2310.00212, 2023).

The policy gradient of whole responses is written over pairs of responses to one prompt, so that only the difference of
their rewards enters: a shift of a prompt's rewards changes nothing. Sequence-level ratios, clipped apart (V1) or jointly
(V2).

.. math::
    \ell_i = \sum_t m_{it}\log\pi_{it}, \quad u_i = e^{\ell_i - \ell^{old}_i}, \quad
    \tilde r_i = r_i - \beta\sum_t m_{it}(\log\pi_{old} - \log\pi_{ref})_{it} \tag{4}

.. math::
    \text{V1: } c_1 = \mathrm{sg}[\Delta r\,u_2],\ c_2 = \mathrm{sg}[-\Delta r\,u_1], \quad
    L = -\tfrac12\sum_{i=1}^2 \min(c_i u_i, c_i\,\mathrm{clip}(u_i, 1-\epsilon, 1+\epsilon)) \tag{5}

.. math::
    \text{V2: } a = \mathrm{sg}[\Delta r\,u_1 u_2],\ x = (\ell_1 - \ell_2) - (\ell^{old}_1 - \ell^{old}_2), \quad
    L = -\tfrac12\min(a x, a\,\mathrm{clip}(x, -\epsilon, \epsilon)) \tag{6}

Mean over the unordered pairs of a group, then over groups with at least two responses (7); no pair: loss 0. The KL
penalty (beta) is `--shaping kl`, which puts the same sum into the reward. Rewards are not standardised: that would bring
the dependence on the shift back. On policy the gradient is RLOO's.

Slots: surrogate. Advantage `rloo` in the recipe feeds diagnostics and selection only.

Use it with rewards known up to a shift of each prompt, such as those of a model trained on comparisons. Not with long
completions and many epochs: the ratio of whole sequences explodes.

Pitfalls: keep few epochs per batch. A loss that averages tokens is no longer the one derived: the sum over tokens is
inside. In V2 it is the change of the log-ratio difference that is clipped.

Not "Policy-on Policy-off Policy Optimization" nor later methods called P3O.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import masked_sum
from polopt.functional.ratio import LOG_RATIO_BOUND
from polopt.method import Method
from polopt.methods.classics.rloo import LeaveOneOut
from polopt.methods.preference.pairs import pairs_in_groups
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def separate_clip_loss(
    u1: Float[Tensor, " M"], u2: Float[Tensor, " M"], reward_gap: Float[Tensor, " M"], eps: float
) -> Float[Tensor, " M"]:
    """Equation (5) of each pair: sequence ratios of the two responses, and the difference of their rewards."""
    loss = torch.zeros_like(u1)
    for own, other, gap in ((u1, u2, reward_gap), (u2, u1, -reward_gap)):
        c = (gap * other).detach()  # the other response only weighs this one; it is not differentiated here
        loss = loss - torch.minimum(c * own, c * own.clamp(1 - eps, 1 + eps)) / 2
    return loss


def joint_clip_loss(
    x1: Float[Tensor, " M"], x2: Float[Tensor, " M"], reward_gap: Float[Tensor, " M"], eps: float
) -> Float[Tensor, " M"]:
    """Equation (6) of each pair, from the sequence log-ratios of the two responses in nats."""
    a = (reward_gap * (x1 + x2).exp()).detach()
    x = x1 - x2
    return -torch.minimum(a * x, a * x.clamp(-eps, eps)) / 2


@register("p3o")
class PairwiseProximal(Surrogate):
    """Pairwise policy gradient with clipped sequence ratios, equations (5) to (7)."""

    coupling = "group"
    zero_advantage_is_silent = False

    class Config(Settings):
        """Options of the pair loss."""

        variant: Literal["v1", "v2"] = "v2"
        """Clip the two ratios apart (v1) or their quotient (v2)."""
        clip: float = Field(0.2, gt=0, lt=1)
        """Width of the clip: of the ratio (v1), of the log-ratio difference in nats (v2)."""

    def loss_weights(self, batch: Batch) -> Float[Tensor, "N T"]:
        """1 on every selected decision: the loss has its own averages."""
        return (batch.weights > 0).to(batch.old_logp)

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        mask = batch.mask & (batch.loss_weight > 0)
        x = (masked_sum(evaluation.logp, mask) - masked_sum(batch.old_logp, mask)).clamp(
            -LOG_RATIO_BOUND, LOG_RATIO_BOUND
        )
        # a response without decisions has the ratio 1 and still takes part with its reward
        i, j, weight, _ = pairs_in_groups(batch.group, (batch.weights > 0).any(-1) | ~batch.mask.any(-1))
        outcome = batch.outcome()
        gap = (outcome[i] - outcome[j]).to(x)
        loss = separate_clip_loss(x[i].exp(), x[j].exp(), gap, self.config.clip) if self.config.variant == "v1" \
            else joint_clip_loss(x[i], x[j], gap, self.config.clip)  # fmt: skip
        return (weight.to(x) * loss).sum() + 0 * x.sum()


@register_recipe("p3o")
def p3o() -> Method:
    """P3O-V2 with two minibatches of whole groups."""
    return Method(advantage=LeaveOneOut(), surrogate=PairwiseProximal(), defaults={"minibatches": 2})
