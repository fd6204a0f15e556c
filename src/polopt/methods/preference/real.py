r"""REAL - Rewards as Labels: Revisiting RLVR from a Classification Perspective (arXiv 2602.05630, 2026).

Binary rewards are class labels. The logit of a rollout is its length-normalised log-ratio to the behaviour policy; a
softmax-type loss with a fixed anchor logit 0 pushes the logits of correct rollouts above 0, of wrong ones below. Gradient
weights are at most 1/tau and largest for the rollouts classified worst.

.. math::
    \bar s_k = \frac{\sum_t m_{kt}(\log\pi_\theta - \log\pi_{old})_{kt}}{\sum_t m_{kt}} \tag{1}

.. math::
    L_q = \log\Big(1 + \sum_{i \in O_+} e^{-\bar s_i/\tau}\Big) + \log\Big(1 + \sum_{j \in O_-} e^{\bar s_j/\tau}\Big), \quad
    L = \frac1Q \sum_{q\,valid} L_q \tag{2, 3}

.. math::
    \text{bce: } \mathrm{mean}_k\,\mathrm{softplus}(\mp\bar s_k/\tau), \qquad
    \text{product: } L_q = \mathrm{softplus}(\mathrm{LSE}_{O_-}(\bar s/\tau) + \mathrm{LSE}_{O_+}(-\bar s/\tau)) \tag{4, 5}

A group is valid if it holds both classes; Q counts all groups of the minibatch, `bce` averages over the rollouts of
valid groups only. Rewards other than 0 and 1 belong to no class (`bce`: the group's maximum is the positive class).
Several reward functions are labels of their own: the losses are added, as a total of 2 or a penalty would be no label.
RECONSTRUCTED: rollouts without a valid token leave their group; groups of unequal size; several rewards.

There is no trust region: one epoch, several minibatches of whole groups.

Slots: surrogate, which reads rewards and groups itself; the advantage slot only feeds diagnostics.

Use it with rewards of 0 and 1 and one epoch per rollout, where bounded weights keep the gradient steady. Not with several
epochs on the same batch: nothing holds the policy, and it falls behind a clip.

Pitfalls: its gradient norms are 3 to 7 times GRPO's: set `max_grad_norm` anew. Groups with one class count in Q, so the
step shrinks as training saturates (`bce` does not). Each token of a long rollout is pushed little.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.functional.masked import masked_sum, row_mean, zero_outside
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings

Variant = Literal["real", "bce", "product"]


def group_logsumexp(
    values: Float[Tensor, " N"],
    member: Bool[Tensor, " N"],
    index: Int[Tensor, " N"],
    count: int,
    anchor: bool,
) -> Float[Tensor, " P"]:
    """log of the sum of exp(values) over the members in each group, plus 1 with an anchor; 0 for an empty sum."""
    floor = torch.zeros(count, dtype=values.dtype)
    start = floor if anchor else floor - torch.inf
    low = torch.where(member, values.detach(), -torch.inf)
    top = start.scatter_reduce(0, index, low, "amax", include_self=True)
    top = torch.where(top.isfinite(), top, floor)
    terms = torch.where(member, (torch.where(member, values, floor[index]) - top[index]).exp(), floor[index])
    total = ((-top).exp() if anchor else floor).index_add(0, index, terms)
    return torch.where(total > 0, top + torch.where(total > 0, total, floor + 1).log(), floor)


def real_loss(
    logits: Float[Tensor, " N"],
    rewards: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    counted: Bool[Tensor, " N"],
    tau: float = 0.5,
    variant: Variant = "real",
) -> Float[Tensor, ""]:
    """Equations (2) to (5).

    Args:
        logits: length-normalised log-ratios (1) in nats, with gradient.
        rewards: 0 or 1; others belong to no class (`bce`: to the negative one, unless the group's maximum).
        group: group ids.
        counted: rollouts with a valid token.
        tau: temperature in nats.
        variant: which of the losses.
    """
    groups = Groups.of(group)
    positive, negative = (rewards == 1) & counted, (rewards == 0) & counted
    scaled = logits / tau
    count = len(groups.size)
    if variant == "bce":
        high = groups.broadcast(groups.max(torch.where(counted, rewards, -torch.inf)))
        low = groups.broadcast(groups.min(torch.where(counted, rewards, torch.inf)))
        valid = counted & (high > low)
        each = torch.where(rewards == high, softplus(-scaled), softplus(scaled))
        return zero_outside(each, valid).sum() / valid.sum().clamp(min=1)
    both = (groups.sum(positive.double()) > 0) & (groups.sum(negative.double()) > 0)
    anchor = variant == "real"
    up = group_logsumexp(-scaled, positive, groups.index, count, anchor)
    down = group_logsumexp(scaled, negative, groups.index, count, anchor)
    each = up + down if variant == "real" else softplus(up + down)
    return zero_outside(each, both).sum() / max(1, count)


@register("real")
class RewardsAsLabels(Surrogate):
    """Classification of rollouts inside their group, equations (1) to (5)."""

    coupling = "group"
    zero_advantage_is_silent = False
    reconstructed = "rollouts without a valid token, groups of unequal size, and several rewards"

    class Config(Settings):
        """Options of the classification loss."""

        variant: Variant = "real"
        """Softmax with anchor (paper), binary cross-entropies, or their product form without anchor."""
        tau: float = Field(0.5, gt=0)
        """Temperature in nats; every rollout's weight is below 1 / tau."""

    def loss_weights(self, batch: Batch) -> Float[Tensor, "N T"]:
        """1 on every selected decision: the loss has its own averages."""
        return (batch.weights > 0).to(batch.old_logp)

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        mask, rule = batch.mask & (batch.loss_weight > 0), (self.config.tau, self.config.variant)
        logits = row_mean(zero_outside(evaluation.logp, mask) - zero_outside(batch.old_logp, mask), mask)
        labels = [batch.rewards]
        if batch.step_rewards is not None:
            labels.append(masked_sum(batch.step_rewards, batch.mask)[:, None].to(batch.rewards))
        loss = logits.new_zeros(())
        for label in torch.cat(labels, 1).to(logits).unbind(1):
            loss = loss + real_loss(logits, label, batch.group, mask.any(-1) & label.isfinite(), *rule)
        return loss


@register_recipe("real")
def real() -> Method:
    """REAL with four minibatches of whole groups, one epoch."""
    return Method(advantage=GroupStandardized(), surrogate=RewardsAsLabels(), defaults={"minibatches": 4})
