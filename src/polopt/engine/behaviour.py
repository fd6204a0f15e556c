"""What the run knows of the policy that made its rollouts.

A sampler whose numerics differ from the trainer's (a model of lower precision) drew from a policy of its own. Its
log-probabilities are kept as `sampler_logp`; `old_logp` are the trainer's own, and the importance weight between the two,
min(exp(old_logp - sampler_logp), cap), goes to each decision. Where the policy does not move before the only update of a
rollout, that update's evaluation is the behaviour policy's and the rollout is not evaluated beforehand: it anchors itself.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.domain import Actor
from polopt.engine.gradient import evaluate_rows
from polopt.engine.ranks import Ranks
from polopt.engine.scores import SCORES, score_vectors
from polopt.method import Method
from polopt.trainer_config import TrainerConfig


def anchors(actor: Actor, config: TrainerConfig) -> bool:
    """One update per rollout with an inexact sampler: the evaluation itself is the behaviour policy's."""
    return not actor.exact_sampler and config.epochs * config.minibatches == 1


def with_evaluations(
    batch: Batch, actor: Actor, method: Method, config: TrainerConfig, ranks: Ranks
) -> Batch:
    """The batch with what the parts require of the behaviour and reference policies, and the sampler's mismatch."""
    recomputes = not actor.exact_sampler and not anchors(actor, config)
    if not actor.exact_sampler and batch.sampler_logp is None:
        batch.sampler_logp = batch.old_logp
    asked = {name for name in method.requires if not batch.has(name)}
    rows, options = torch.arange(len(batch)), method.evaluation_options()
    if old := {name[4:] for name in asked if name.startswith("old_")} | ({"logp"} if recomputes else set()):
        batch.set_evaluated("old", evaluate_rows(actor, batch, rows, frozenset(old), options, ranks))
    if reference := {name[4:] for name in asked if name.startswith("ref_")}:
        with actor.reference():
            found = evaluate_rows(actor, batch, rows, frozenset(reference), options, ranks)
        batch.set_evaluated("ref", found)
    for name in sorted(asked & SCORES):
        setattr(batch, name, score_vectors(actor, batch, per_decision=name == "decision_scores", ranks=ranks))
    return batch


def anchored(evaluation: Evaluation, batch: Batch, cap: float) -> Batch:
    """The batch with the evaluation as the behaviour policy's, weighted for the sampler that drew instead of it."""
    batch = batch.clone(recurse=False)
    batch.old_logp = evaluation.logp.detach()
    batch.loss_weight = batch.loss_weight * sampler_weight(batch, cap)
    return batch


def sampler_weight(batch: Batch, cap: float) -> Float[Tensor, "N T"]:
    """Importance weight of each decision between the behaviour policy and the sampler, at most `cap`."""
    gap = torch.where(batch.mask, batch.old_logp - batch.sampler_logp, 0.0)
    return gap.exp().clamp(max=cap)
