"""Score vectors are the gradients that they claim to be, and are refused where they do not fit."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polopt
from polopt.batch import Batch, Evaluation
from polopt.domain import Plan
from polopt.engine import scores as engine
from polopt.engine.ranks import Ranks
from polopt.engine.scores import check_scores, score_vectors
from polopt.errors import ConfigError
from polopt.miniature import SumModActor, SumModTask


class _Double(torch.autograd.Function):
    """A hand-written backward pass that `vmap` cannot batch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        found = torch.zeros(gradient.shape, dtype=gradient.dtype)
        return found.index_add_(0, torch.arange(len(gradient)), 2 * gradient)


class HandWritten(SumModActor):
    """Log-probabilities doubled by hand."""

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: object) -> Evaluation:
        return Evaluation(_Double.apply(super().evaluate(batch, requires, **options).logp))


def made(kind: type[SumModActor] = SumModActor, rows: int = 5) -> tuple[SumModActor, Batch]:
    """An actor and ragged trajectories, one without decisions."""
    task = SumModTask(modulus=3, length=3)
    actor = kind(task, width=4, rows=rows)
    plan = Plan(torch.arange(4), torch.full((4,), 5))
    batch = SumModActor(task, width=4).rollout(task, plan, torch.Generator().manual_seed(0)).batch
    batch.mask[::3, 1] = False
    batch.mask[7] = False
    return actor, batch


def gradient(actor: SumModActor, logp: Tensor) -> Tensor:
    found = torch.autograd.grad(
        logp, list(actor.module.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_scores_are_gradients_of_log_probabilities(rows: int) -> None:
    actor, batch = made(rows=rows)
    logp = actor.evaluate(batch, frozenset({"logp"})).logp
    found = score_vectors(actor, batch, per_decision=True)
    for row in range(len(batch)):
        for step in range(3):
            expected = gradient(actor, logp[row, step]) * batch.mask[row, step]
            assert_close(found[row, step], expected)
    assert not found[7].any()
    assert_close(score_vectors(actor, batch, per_decision=False), found.sum(1, keepdim=True))


@pytest.mark.parametrize("per_decision", [False, True])
def test_hand_written_backward_passes_are_taken_one_by_one(per_decision: bool) -> None:
    plain = score_vectors(*made(), per_decision=per_decision)
    assert_close(score_vectors(*made(HandWritten), per_decision=per_decision), 2 * plain)


def test_no_gradient_is_left_behind() -> None:
    actor, batch = made()
    with torch.no_grad():
        found = score_vectors(actor, batch, per_decision=False)
    assert found.any() and not found.requires_grad
    assert all(p.grad is None for p in actor.module.parameters())


def test_untrained_parameters_are_left_out() -> None:
    actor, batch = made()
    actor.module["critic"].requires_grad_(False)
    trained = sum(p.numel() for p in actor.module.parameters() if p.requires_grad)
    assert score_vectors(actor, batch, per_decision=False).shape == (20, 1, trained)


def test_no_trajectories_no_scores() -> None:
    actor, batch = made()
    assert score_vectors(actor, batch[:0], per_decision=False).shape[0] == 0


def test_scores_that_do_not_fit_are_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIMIT", 1000)
    actor, batch = made()
    with pytest.raises(ConfigError, match="decision_scores: 60 x"):
        score_vectors(actor, batch, per_decision=True)
    task = SumModTask()
    with pytest.raises(ConfigError, match="scores: 128 x 1159 parameters"):
        polopt.Trainer(SumModActor(task), task, polopt.recipe("bpg"))


def test_sharded_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="sharding"):
        check_scores("scores", 1, 1, made()[0].module, Ranks(sharding="fsdp2"))
