"""Decision-space gradients: the exact gradient of any minibatch objective, whatever the micro-batches and the ranks.

An objective is a function of the whole minibatch's evaluation, a few [N, T] tensors. Its derivative with respect to them
is taken once and pulled back through the network micro-batch by micro-batch, a vector-Jacobian product each:

    1. evaluate every micro-batch without gradient         skipped while `current` is still the policy's evaluation
    2. d objective / d evaluation, on the small tensors
    3. evaluate every micro-batch with gradient, and backward with its rows of that derivative

An objective that is a sum over trajectories needs 3 alone: each micro-batch's own loss is its share (`separable`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.engine.ranks import Ranks

Objective = Callable[[Evaluation, Batch], Float[Tensor, ""]]
Rows = Int[Tensor, " n"]
DIFFERENTIABLE = ("logp", "entropy", "value")


class Evaluator(Protocol):
    """What the engine needs of an actor."""

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current policy's view of the batch's decisions, [N, T], with gradient where gradients are on."""
        ...

    def micro_batches(self, batch: Batch) -> list[Rows]:
        """The batch's rows in pieces that fit into memory, together all of them."""
        ...


@dataclass(frozen=True)
class Backward:
    """What a backward pass over a minibatch found. The gradients lie in the parameters."""

    loss: Float[Tensor, ""]
    evaluation: Evaluation
    """Of the evaluated trajectories, detached, in the order of `rows`."""
    rows: Rows
    """The trajectories that were evaluated."""


def evaluate_rows(
    actor: Evaluator, batch: Batch, rows: Rows, requires: frozenset[str], options: dict[str, Any], ranks: Ranks
) -> Evaluation:
    """The evaluation of some rows, without gradient, in micro-batches and over the ranks; [n, T] in the order of `rows`."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for piece in ranks.share(actor.micro_batches(batch[rows])):
            evaluation = actor.evaluate(batch[rows[piece.rows]], requires, **options)
            for name, tensor in evaluation.tensors().items():
                whole = found.setdefault(name, tensor.new_zeros(len(rows), *tensor.shape[1:]))
                whole[piece.rows] = tensor * piece.counts if tensor.is_floating_point() else tensor * int(piece.counts)
    return Evaluation(**{name: ranks.sum(tensor) for name, tensor in sorted(found.items())})


def backward(
    actor: Evaluator,
    batch: Batch,
    objective: Objective,
    requires: frozenset[str],
    *,
    separable: bool,
    rows: Rows | None = None,
    current: Evaluation | None = None,
    options: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Backward:
    """Add the gradient of `objective(evaluation, batch)` to the parameters' `.grad`, summed over the ranks.

    Args:
        actor: evaluates the policy.
        batch: the minibatch, the same on every rank, with `loss_weight`.
        objective: the scalar to descend, a function of evaluation and batch.
        requires: fields of the evaluation that it reads.
        separable: it is a sum over trajectories; then it is taken on each micro-batch alone.
        rows: trajectories to evaluate; the others keep the behaviour policy's values and get no gradient. None: all.
        current: the evaluation of `rows`, if it is known, which spares the first pass.
        options: for `actor.evaluate`.
        ranks: the processes that share the work; None: this one.

    Returns:
        The loss and the evaluation behind it.
    """
    ranks = ranks or Ranks()
    rows = torch.arange(len(batch)) if rows is None else rows
    options = options or {}
    if separable:
        return _fused(actor, batch, objective, requires, rows, options, ranks)
    if current is None:
        current = evaluate_rows(actor, batch, rows, requires, options, ranks)
    leaves = {name: t.detach().requires_grad_(name in DIFFERENTIABLE) for name, t in current.tensors().items()}
    with torch.enable_grad():
        loss = objective(_among_all(Evaluation(**leaves), batch, rows), batch)
    pulled = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    cotangents = torch.autograd.grad(loss, list(pulled.values()), allow_unused=True) if loss.requires_grad else ()
    gradients = {name: g for name, g in zip(pulled, cotangents, strict=bool(cotangents)) if g is not None}
    for piece in ranks.share(actor.micro_batches(batch[rows])):
        evaluation = actor.evaluate(batch[rows[piece.rows]], requires, **options).tensors()
        outputs = [evaluation[name] for name in gradients]
        torch.autograd.backward(outputs, [g[piece.rows].to(o) * piece.counts for g, o in zip(gradients.values(), outputs, strict=True)])
    ranks.sum_gradients(actor)
    return Backward(loss.detach(), current.detach(), rows)


def _fused(
    actor: Evaluator, batch: Batch, objective: Objective, requires: frozenset[str], rows: Rows, options: dict[str, Any], ranks: Ranks
) -> Backward:
    total = torch.zeros((), dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for piece in ranks.share(actor.micro_batches(batch[rows])):
        part = batch[rows[piece.rows]]
        evaluation = actor.evaluate(part, requires, **options)
        loss = objective(evaluation, part) * piece.counts
        if loss.requires_grad:
            loss.backward()
        total += loss.detach().double().cpu()
        for name, tensor in evaluation.detach().tensors().items():
            whole = found.setdefault(name, tensor.new_zeros(len(rows), *tensor.shape[1:]))
            whole[piece.rows] = tensor * piece.counts if tensor.is_floating_point() else tensor * int(piece.counts)
    evaluation = Evaluation(**{name: ranks.sum(tensor) for name, tensor in sorted(found.items())})
    ranks.sum_gradients(actor)
    return Backward(ranks.sum(total), evaluation, rows)


def _among_all(evaluation: Evaluation, batch: Batch, rows: Rows) -> Evaluation:
    """The evaluation of `rows` among all rows of the batch; elsewhere the behaviour policy's values, constant."""
    if len(rows) == len(batch):
        order = torch.argsort(rows)
        return evaluation if bool((rows == torch.arange(len(rows))).all()) else evaluation.map(lambda t: t[order])
    whole: dict[str, Tensor] = {}
    for name, tensor in evaluation.tensors().items():
        old = cast(Tensor | None, getattr(batch, f"old_{name}", None))
        rest = tensor.new_zeros(len(batch), *tensor.shape[1:]) if old is None else old.to(tensor)
        whole[name] = rest.index_copy(0, rows, tensor)
    return Evaluation(**whole)
