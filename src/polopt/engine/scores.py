"""Score vectors: gradients of log-probabilities, one for each trajectory or for each decision.

With respect to all n trained parameters, they are N x n or N x T x n numbers, so they are computed only for methods
that name `scores` or `decision_scores` in their `requires`, and refused above `LIMIT` bytes. Each is a backward pass of
its own: a few trajectories are evaluated at once and their passes are vectorised (`vmap`), or taken one after the other
where the policy has hand-written backward passes, which `vmap` cannot batch.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.engine.gradient import Evaluator
from polopt.engine.ranks import Ranks
from polopt.errors import ConfigError

SCORES = frozenset({"scores", "decision_scores"})
"""Fields of a batch that are computed here, whatever the actor."""
LIMIT = 2**31
"""Bytes that the score vectors of an iteration may take."""
TOGETHER = 16
"""Trajectories or decisions whose backward passes are taken at once."""


def check_scores(name: str, rows: int, decisions: int, module: nn.Module, ranks: Ranks) -> None:
    """Refuse score vectors that do not fit into memory.

    Args:
        name: `scores` or `decision_scores`.
        rows: trajectories of an iteration.
        decisions: of the longest trajectory; 1 where it is not yet known.
        module: has the parameters.
        ranks: the processes of the run.

    Raises:
        ConfigError: they would take more than `LIMIT` bytes, or the parameters are sharded.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    count = rows * (decisions if name == "decision_scores" else 1)
    size = sum(p.numel() * p.element_size() for p in trained) * count
    if size > LIMIT:
        parameters = sum(p.numel() for p in trained)
        raise ConfigError(
            f"{name}: {count} x {parameters} parameters take {size / 2**30:.3g} GiB, above {LIMIT / 2**30:g}; "
            "train fewer parameters (an adapter, a smaller policy) or fewer trajectories at once"
        )
    if ranks.sharding != "none":
        raise ConfigError(f"{name}: needs whole parameters on every rank; set trainer.sharding = 'none'")


def score_vectors(
    actor: Evaluator, batch: Batch, *, per_decision: bool, ranks: Ranks | None = None
) -> Float[Tensor, "N #T n"]:
    r"""Gradients of the present policy's log-probabilities with respect to its trained parameters.

    Args:
        actor: evaluates the policy.
        batch: what was done.
        per_decision: of each decision, [N, T, n]; else of each trajectory's sum, [N, 1, n].
        ranks: the processes that share the work; None: this one.

    Returns:
        The score vectors, 0 where nothing was decided; parameters in the order of `actor.module.parameters()`, those
        that are not trained left out.

    Raises:
        ConfigError: they do not fit into memory.
    """
    ranks = ranks or Ranks()
    decisions = batch.mask.shape[1]
    check_scores("decision_scores" if per_decision else "scores", len(batch), decisions, actor.module, ranks)
    trained = [p for p in actor.module.parameters() if p.requires_grad]
    width = decisions if per_decision else 1
    dtype = trained[0].dtype
    for parameter in trained:
        dtype = torch.promote_types(dtype, parameter.dtype)
    whole = torch.zeros(
        len(batch), width, sum(p.numel() for p in trained), dtype=dtype, device=batch.mask.device
    )
    if not len(batch):
        return whole
    for piece in ranks.share(actor.micro_batches(batch), batch.lengths):
        if piece.counts:
            for rows in piece.rows.split(max(1, TOGETHER // width)):
                for row, column, scores in _scores_of(actor, batch[rows], trained, per_decision):
                    whole[rows[row], column] = scores.to(dtype)
    return ranks.sum(whole)


def _scores_of(
    actor: Evaluator, batch: Batch, trained: list[nn.Parameter], per_decision: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows and columns of a few trajectories' scores, [k] each, and the scores [k, n]."""
    with torch.enable_grad():
        logp = actor.evaluate(batch, frozenset({"logp"})).logp
        logp = torch.where(batch.mask, logp, torch.zeros((), dtype=logp.dtype, device=logp.device))
        outputs = logp if per_decision else logp.sum(-1, keepdim=True)
    decided = batch.mask if per_decision else batch.mask.any(-1, keepdim=True)
    if not bool(decided.any()):
        return
    together = TOGETHER if _vectorises(outputs) else 1
    if together == 1 and len(batch) > 1:  # a pass of its own each: through its own trajectory's graph only
        for number in range(len(batch)):
            for row, column, scores in _scores_of(actor, batch[number : number + 1], trained, per_decision):
                yield row + number, column, scores
        return
    for places in decided.nonzero().split(together):
        row, column = places[:, 0], places[:, 1]
        units = outputs.new_zeros(len(places), *outputs.shape)
        units[torch.arange(len(places)), row, column] = 1.0
        if together == 1:
            found = torch.autograd.grad(outputs, trained, units[0], retain_graph=True, allow_unused=True)
            found = [None if g is None else g[None] for g in found]
        else:
            found = torch.autograd.grad(
                outputs, trained, units, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        columns = [
            (units.new_zeros(len(places), *p.shape) if g is None else g).flatten(1)
            for p, g in zip(trained, found, strict=True)
        ]
        yield row, column, torch.cat(columns, -1)


def _vectorises(outputs: Tensor) -> bool:
    """Whether the graph behind `outputs` has torch's own operations alone, which `vmap` knows how to batch."""
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return False
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return True
