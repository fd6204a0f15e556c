"""Products of the Hessian of an expected loss with a vector, from trajectories, without ever forming the Hessian.

With c the derivative of the loss with respect to a batch's evaluation, held constant, phi_i = sum_t c_it log pi_it the
loss of trajectory i and s_i = sum_t grad log pi_it its score, the product with v is estimated by

    sum_i [ grad phi_i <s_i, v> + Hessian(phi_i) v ]

The inner products are one for each trajectory; all of them, and the second term, come from one backward pass through
the gradient of sum_i phi_i as a function of c. Memory is that of three gradients, whatever the number of trajectories.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import Evaluator, Objective, differentiate
from polopt.engine.ranks import Ranks


@torch.enable_grad()
def hessian_product(
    actor: Evaluator,
    batch: Batch,
    objective: Objective,
    requires: frozenset[str],
    direction: Sequence[Tensor],
    *,
    parameters: Sequence[nn.Parameter],
    options: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """The estimate from a batch that the present parameters made, in micro-batches and over the ranks.

    Args:
        actor: evaluates the policy; its evaluation must be differentiable twice.
        batch: trajectories with `loss_weight`, the same on every rank.
        objective: the loss, a sum over trajectories of functions of `logp` and `entropy`.
        requires: fields of the evaluation that it reads.
        direction: v, a tensor for each parameter.
        parameters: what the derivatives are taken with respect to; their `.grad` stays as it is.
        options: for `actor.evaluate`.
        ranks: the processes that share the work; None: this one.

    Returns:
        A tensor for each parameter; zeros where no trajectory has weight.
    """
    ranks = ranks or Ranks()
    total = [torch.zeros_like(p) for p in parameters]
    batch = batch[(batch.loss_weight != 0).any(-1)]
    if not len(batch):
        return total
    for piece in ranks.share(actor.micro_batches(batch), batch.lengths):
        part = batch[piece.rows]
        evaluation = actor.evaluate(part, requires, **(options or {})).where(part.mask)
        cotangents = differentiate(partial(_of_part, objective, part), evaluation)[1]
        found = evaluation_product(evaluation, cotangents, part.mask, parameters, direction)
        if piece.counts:
            torch._foreach_add_(total, found)
    return [ranks.sum(tensor) for tensor in total]


def evaluation_product(
    evaluation: Evaluation,
    cotangents: dict[str, Float[Tensor, "N T"]],
    mask: Bool[Tensor, "N T"],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> list[Tensor]:
    """`sum_i [grad phi_i <s_i, v> + Hessian(phi_i) v]` of evaluated trajectories.

    Args:
        evaluation: with gradient; nothing of it flows outside the mask.
        cotangents: c, the weights of its fields in phi.
        mask: decisions whose log-probabilities are part of the score.
        parameters: what it is a function of.
        direction: v, a tensor for each parameter.
        retain_graph: the evaluation is still wanted with its gradient.

    Returns:
        A tensor for each parameter.
    """
    outputs = evaluation.tensors()
    cotangents = {name: c for name, c in cotangents.items() if outputs[name].requires_grad}
    pulled = [outputs[name] for name in cotangents]
    levers = {name: c.detach().clone().requires_grad_() for name, c in cotangents.items()}
    derivative = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    gradient = derivative(pulled, parameters, list(levers.values()), create_graph=True)
    slope = torch.stack([(g * v).sum() for g, v in zip(gradient, direction, strict=True)]).sum()
    of_logp, *curvature = derivative(slope, [levers["logp"], *parameters], retain_graph=True)
    score = torch.where(mask, of_logp, 0.0).sum(-1, keepdim=True)  # <s_i, v>
    outer = derivative(
        pulled, parameters, [c * score for c in cotangents.values()], retain_graph=retain_graph
    )
    return [a + b for a, b in zip(outer, curvature, strict=True)]


def _of_part(objective: Objective, part: Batch, evaluation: Evaluation) -> Float[Tensor, ""]:
    return objective(evaluation, part)
