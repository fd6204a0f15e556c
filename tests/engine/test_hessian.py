"""Hessian-vector products through an actor: exact over all trajectories, whatever the micro-batches."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polopt
from polopt.batch import Batch, Evaluation
from polopt.domain import Plan
from polopt.engine.hessian import hessian_product
from polopt.engine.ranks import Ranks
from polopt.method import Method
from polopt.miniature import SumModActor, SumModTask

LENGTH, MODULUS, GOALS = 3, 3, 2


def everything(actor: SumModActor, task: SumModTask, method: Method) -> Batch:
    """Every completion of two goals with its probability as its weight, ready for the objective."""
    completions = list(itertools.product(range(MODULUS), repeat=LENGTH))
    plan = Plan(torch.arange(GOALS), torch.full((GOALS,), len(completions)))
    batch = actor.rollout(task, plan, torch.Generator()).batch
    tokens = torch.tensor(completions).repeat(GOALS, 1)
    batch.payload["tokens"] = tokens
    batch.rewards = task.rewards(tokens, batch.prompt_id) + tokens[:, :1] / 7
    with torch.no_grad():
        batch.old_logp = actor.evaluate(batch, frozenset({"logp"})).logp
    batch = method.prepare(batch, lambda stream: torch.Generator())
    batch.loss_weight = batch.old_logp.sum(-1, keepdim=True).exp().expand(-1, LENGTH) / GOALS
    return batch


def expected_product(
    actor: SumModActor, batch: Batch, entropy: float, direction: list[Tensor]
) -> list[Tensor]:
    """By differentiating the expected loss, a sum over all completions, twice."""
    parameters = list(actor.module.parameters())
    evaluation = actor.evaluate(batch, frozenset({"logp", "entropy"}))
    probability = evaluation.logp.sum(-1).exp() / GOALS
    last = batch.advantages[:, -1]
    loss = -(probability * last).sum()
    gradient = torch.autograd.grad(
        loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    slope = torch.stack([(g * v).sum() for g, v in zip(gradient, direction, strict=True)]).sum()
    field = entropy * (probability.detach()[:, None] * evaluation.entropy)
    smooth = torch.autograd.grad(
        field.sum(), parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    slope = slope - torch.stack([(g * v).sum() for g, v in zip(smooth, direction, strict=True)]).sum()
    found = torch.autograd.grad(slope, parameters, allow_unused=True, materialize_grads=True)
    return list(found)


def setting(rows: int, **slots: Any) -> tuple[SumModActor, Method, Batch, list[Tensor]]:
    task = SumModTask(modulus=MODULUS, length=LENGTH, train_size=GOALS)
    actor = SumModActor(task, width=5, rows=rows)
    method = polopt.recipe("harpg", advantage="discounted-to-go:gamma=0.9", **slots)
    draws = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in actor.module.parameters()]
    return actor, method, everything(actor, task, method), direction


def product(actor: SumModActor, method: Method, batch: Batch, direction: list[Tensor]) -> list[Tensor]:
    parameters = list(actor.module.parameters())
    return hessian_product(actor, batch, method.objective, method.evaluated, direction, parameters=parameters)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("surrogate", ["reinforce", "ppo", "mhpo:use_hazard=false"])
def test_i4_over_all_completions_it_is_the_hessian_of_the_expected_loss(rows: int, surrogate: str) -> None:
    actor, method, batch, direction = setting(rows, surrogate=surrogate)
    expected = expected_product(actor, batch, 0.0, direction)
    for found, wanted in zip(product(actor, method, batch, direction), expected, strict=True):
        assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in actor.module.parameters())


def test_an_entropy_bonus_has_the_derivative_of_its_gradient_where_states_are_drawn_anew() -> None:
    actor, method, batch, direction = setting(7, regularizers="entropy:coef=0.3")
    bare = polopt.recipe("harpg", advantage="discounted-to-go:gamma=0.9")
    found = product(actor, method, batch, direction)
    without = product(actor, bare, batch, direction)
    step = 1e-5
    parameters, fields = list(actor.module.parameters()), []
    for sign in (step, -step):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p += sign * v
        fields.append(entropy_field(actor, batch, 0.3))
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p -= sign * v
    for one, other, up, down in zip(found, without, *fields, strict=True):
        assert_close(one - other, (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def entropy_field(actor: SumModActor, batch: Batch, coef: float) -> list[Tensor]:
    """The expected gradient of the penalty: probabilities of the completions at the present parameters, constant."""
    evaluation: Evaluation = actor.evaluate(batch, frozenset({"logp", "entropy"}))
    probability = evaluation.logp.detach().sum(-1, keepdim=True).exp() / GOALS
    penalty = -coef * (probability * evaluation.entropy).sum()
    parameters = list(actor.module.parameters())
    return list(torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True))


def test_without_any_weight_it_is_0() -> None:
    actor, method, batch, direction = setting(7)
    batch.loss_weight = torch.zeros_like(batch.loss_weight)
    assert not any(t.any() for t in product(actor, method, batch, direction))


class Alone(Ranks):
    """One of two ranks that keeps its share of every sum."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("rows", [5, 1000])
def test_two_ranks_find_shares_of_what_one_finds(rows: int) -> None:
    actor, method, batch, direction = setting(rows)
    for b in (batch, batch[:1]):  # one row: the other rank's work does not count
        expected = product(actor, method, b, direction)
        first, second = (
            hessian_product(
                actor, b, method.objective, method.evaluated, direction,
                parameters=list(actor.module.parameters()), ranks=Alone(rank, 2),
            )
            for rank in (0, 1)
        )  # fmt: skip
        for one, other, whole in zip(first, second, expected, strict=True):
            assert_close(one + other, whole, rtol=1e-10, atol=1e-12)
