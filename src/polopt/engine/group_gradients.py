"""The gradient of a minibatch, group by group, for optimizers that ask how far the groups agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polopt.engine.gradient import Backward, Rows


@dataclass(frozen=True)
class Agreement:
    """With g_p the gradient of group p times the number of groups, so that the whole gradient is their mean."""

    square_sum: Float[Tensor, ""]
    """sum_p |g_p|^2."""
    mean_square: Float[Tensor, ""]
    """|mean_p g_p|^2."""
    groups: int
    """Groups that were evaluated."""


def backward_by_group(
    backward: Callable[[Rows], Backward],
    parameters: Sequence[nn.Parameter],
    rows: Rows,
    group: Int[Tensor, " n"],
) -> tuple[Backward, Agreement]:
    """Run `backward` on the rows of each group alone; the parameters' `.grad` hold the sum afterwards.

    Args:
        backward: adds the gradient of some rows' share of the loss to `.grad`.
        parameters: what is trained.
        rows: rows to evaluate.
        group: group id of each of them.
    """
    total = [torch.zeros_like(p) for p in parameters]
    square_sum, parts = torch.zeros((), dtype=torch.float64), []
    for number in group.unique():
        for parameter in parameters:
            parameter.grad = None
        parts.append(backward(rows[group == number]))
        for sum_, parameter in zip(total, parameters, strict=True):
            if parameter.grad is not None:
                square_sum += parameter.grad.double().square().sum()
                sum_ += parameter.grad
    for sum_, parameter in zip(total, parameters, strict=True):
        parameter.grad = sum_
    mean_square = sum((s.double().square().sum() for s in total), torch.zeros((), dtype=torch.float64))
    return _joined(parts, rows), Agreement(square_sum * len(parts) ** 2, mean_square, len(parts))


def _joined(parts: list[Backward], rows: Rows) -> Backward:
    """The parts as one backward pass, in the order of `rows`."""
    found = torch.cat([part.rows for part in parts])
    order = torch.argsort(found)[torch.argsort(torch.argsort(rows))]
    fields = parts[0].evaluation.tensors()
    whole = {name: torch.cat([part.evaluation.tensors()[name] for part in parts])[order] for name in fields}
    loss = torch.stack([part.loss for part in parts]).sum()
    return Backward(loss, type(parts[0].evaluation)(**whole), rows)
