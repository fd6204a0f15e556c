"""Decision-space gradients: the exact gradient of any minibatch objective, whatever the micro-batches and the ranks.

An objective is a function of the whole minibatch's evaluation, a few [N, T] tensors. Its derivative with respect to
them is taken once and pulled back through the network micro-batch by micro-batch, a vector-Jacobian product each:

    1. evaluate every micro-batch without gradient         skipped while `current` is still the policy's evaluation
    2. d objective / d evaluation, on the small tensors
    3. evaluate every micro-batch with gradient, and backward with its rows of that derivative

An objective that is a sum over trajectories needs 3 alone: step 2 is taken on each micro-batch (`separable`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient_block import gradients_in_one_block
from polopt.engine.ranks import Piece, Ranks

Objective = Callable[[Evaluation, Batch], Float[Tensor, ""]]
Rows = Int[Tensor, " n"]
DIFFERENTIABLE = (
    "logp", "entropy", "value", "median", "kl",
    "fresh_logp", "fresh_old_logp", "fresh_q", "q", "squared_outputs",
)  # fmt: skip


class Evaluator(Protocol):
    """What the engine needs of an actor."""

    @property
    def module(self) -> nn.Module:
        """Has the parameters."""
        ...

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
    actor: Evaluator,
    batch: Batch,
    rows: Rows,
    requires: frozenset[str],
    options: dict[str, Any],
    ranks: Ranks,
) -> Evaluation:
    """The evaluation of some rows, [n, T] in their order, without gradient, in micro-batches and over the ranks.

    Without rows its fields are [0, T].
    """
    if not len(rows):
        return Evaluation(**dict.fromkeys(requires | {"logp"}, batch.old_logp[rows]))
    found = _Found(len(rows))
    with torch.no_grad():
        evaluated = batch.take(rows)
        for piece, part, outputs in _Passes(actor, requires, options, ranks).over(evaluated):
            found.add(piece, outputs, part is evaluated)
    return found.on_all(ranks)


@torch.enable_grad()
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
        The loss and the evaluation behind it. A separable loss is that of `rows` alone, in float64.

    Raises:
        ValueError: there are no rows.
    """
    evaluated = batch if rows is None else batch.take(rows)
    rows = torch.arange(len(batch)) if rows is None else rows
    passes = _Passes(actor, requires, options or {}, ranks or Ranks())
    with passes.ranks.sum_gradients(actor.module), gradients_in_one_block(actor.module):
        if separable:
            return _separable(passes, evaluated, objective, rows)
        if current is None:
            current = evaluate_rows(actor, batch, rows, requires, passes.options, passes.ranks)
        loss, cotangents = differentiate(lambda e: objective(_among_all(e, batch, rows), batch), current)
        for piece, _, outputs in passes.over(evaluated):
            _pull_back(
                piece, outputs, {name: cotangent[piece.rows] for name, cotangent in cotangents.items()}
            )
        return Backward(loss, current.detach(), rows)


@dataclass(frozen=True)
class _Passes:
    """How micro-batches are evaluated."""

    actor: Evaluator
    requires: frozenset[str]
    options: dict[str, Any]
    ranks: Ranks

    def over(self, batch: Batch) -> Iterator[tuple[Piece, Batch, dict[str, Tensor]]]:
        """This rank's micro-batches, each with its trajectories and their evaluation."""
        if not len(batch):
            raise ValueError("rows: there are none to evaluate")
        for piece in self.ranks.share(self.actor.micro_batches(batch), batch.lengths):
            part = batch.take(piece.rows)
            evaluate = partial(self.actor.evaluate, part, self.requires, **self.options)
            yield piece, part, self.ranks.forward(lambda evaluate=evaluate: evaluate().tensors())


class _Found:
    """The evaluation of `size` rows, gathered piece by piece."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fields: dict[str, Tensor] = {}

    def add(self, piece: Piece, outputs: dict[str, Tensor], whole: bool) -> None:
        """Take over a piece's outputs, which are those of all rows in order where it is the `whole`."""
        if piece.counts and whole:
            self.fields = {name: tensor.detach() for name, tensor in outputs.items()}
            return
        for name, tensor in outputs.items():
            if name not in self.fields:
                self.fields[name] = tensor.new_zeros(self.size, *tensor.shape[1:])
            if piece.counts:
                self.fields[name][piece.rows] = tensor.detach()

    def on_all(self, ranks: Ranks) -> Evaluation:
        return Evaluation(**{name: ranks.sum(tensor) for name, tensor in sorted(self.fields.items())})


def _separable(passes: _Passes, evaluated: Batch, objective: Objective, rows: Rows) -> Backward:
    total = torch.zeros((), dtype=torch.float64)
    found = _Found(len(rows))
    for piece, part, outputs in passes.over(evaluated):
        found.add(piece, outputs, part is evaluated)
        if not piece.counts:
            _pull_back(piece, outputs, dict.fromkeys(set(DIFFERENTIABLE) & outputs.keys(), total))
            continue
        loss = objective(constant_elsewhere(outputs), part)
        total = total + loss.detach().double().cpu()
        if loss.requires_grad:
            loss.backward()
    return Backward(passes.ranks.sum(total), found.on_all(passes.ranks), rows)


def constant_elsewhere(outputs: dict[str, Tensor]) -> Evaluation:
    """The evaluation, without gradient where it has none by contract."""
    return Evaluation(**{n: t if n in DIFFERENTIABLE else t.detach() for n, t in outputs.items()})


def differentiate(
    objective: Callable[[Evaluation], Float[Tensor, ""]], evaluation: Evaluation
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The objective at an evaluation, and its derivative there with respect to each field that can have one."""
    leaves = {
        name: t.detach().requires_grad_(name in DIFFERENTIABLE) for name, t in evaluation.tensors().items()
    }
    loss = objective(Evaluation(**leaves))
    fields = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not loss.requires_grad:
        return loss, {name: torch.zeros_like(leaf) for name, leaf in fields.items()}
    found = torch.autograd.grad(loss, list(fields.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(fields, found, strict=True))


def _pull_back(piece: Piece, outputs: dict[str, Tensor], cotangents: dict[str, Tensor]) -> None:
    """Add the derivatives of the outputs, times the cotangents, to the parameters' `.grad`."""
    pulled = {name: outputs[name] for name in cotangents if outputs[name].requires_grad}
    weights = [cotangents[n].to(out) if piece.counts else torch.zeros_like(out) for n, out in pulled.items()]
    if pulled:
        torch.autograd.backward(list(pulled.values()), weights)


def _among_all(evaluation: Evaluation, batch: Batch, rows: Rows) -> Evaluation:
    """The evaluation of `rows` among all rows of the batch; elsewhere the behaviour policy's values, constant."""
    whole: dict[str, Tensor] = {}
    for name, tensor in evaluation.tensors().items():
        old = getattr(batch, f"old_{name}", None)
        if old is None and batch.has(f"old_{name}"):
            old = batch.signal(f"old_{name}")
        rest = tensor.new_zeros(len(batch), *tensor.shape[1:]) if old is None else old.detach().to(tensor)
        whole[name] = rest.index_copy(0, rows, tensor)
    return Evaluation(**whole)
