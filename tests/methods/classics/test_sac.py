"""Equations of soft actor-critic on its parts, with numbers worked out by hand."""

import pytest
import torch
from torch.testing import assert_close

import polopt
from polopt.batch import Evaluation
from polopt.methods.classics.sac import NoAdvantage, SoftActor, SoftCritics, SquaredOutputs
from polopt.testing import random_batch
from polopt.testing.subject import draws


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluation() -> Evaluation:
    """Two rows of two decisions."""
    names = ("logp", "value", "fresh_logp", "next_value", "squared_outputs")
    fields = {name: numbers(2, 2, seed=seed).requires_grad_() for seed, name in enumerate(names)}
    twins = {
        name: numbers(2, 2, 2, seed=seed).requires_grad_() for seed, name in enumerate(("q", "fresh_q"), 9)
    }
    return Evaluation(**fields, **twins)


def batch(temperature: float) -> polopt.Batch:
    """Both rows have two decisions; the second ended by itself."""
    method = polopt.recipe("sac", "control", surrogate=f"sac:temperature={temperature}")
    made = random_batch(method.requires, groups=(2,), steps=2)
    made.mask = torch.ones(2, 2, dtype=torch.bool)
    made.terminated = torch.tensor([False, True])
    made = method.prepare(made, draws(0))
    made.loss_weight = method.surrogate.loss_weights(made)
    return made


def test_policy_loss_is_the_weighted_entropy_less_the_first_critic() -> None:
    e = evaluation()
    found = SoftActor(temperature=0.3)(e, batch(0.3))
    assert_close(found, (0.3 * e.fresh_logp - e.fresh_q[..., 0]).mean())


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_critics_are_fitted_to_their_targets_with_the_surrogates_temperature(temperature: float) -> None:
    e, data = evaluation(), batch(temperature)
    ended = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    backup = data.step_rewards + 0.9 * (1 - ended) * e.next_value
    state = e.fresh_q.min(-1).values - temperature * e.fresh_logp
    by_hand = ((e.q[..., 0] - backup) ** 2 + (e.q[..., 1] - backup) ** 2 + (e.value - state) ** 2).mean() / 2
    assert_close(SoftCritics(gamma=0.9)(e, data), by_hand)


def test_critics_loss_has_a_gradient_to_value_and_critics_alone() -> None:
    e = evaluation()
    SoftCritics()(e, batch(0.2)).backward()
    with_gradient = {name for name, tensor in e.tensors().items() if tensor.grad is not None}
    assert with_gradient == {"q", "value"}


def test_policy_loss_has_a_gradient_to_the_fresh_decision_alone() -> None:
    e = evaluation()
    (SoftActor()(e, batch(0.2)) + SquaredOutputs()(e, batch(0.2))).backward()
    with_gradient = {name for name, tensor in e.tensors().items() if tensor.grad is not None}
    assert with_gradient == {"fresh_logp", "fresh_q", "squared_outputs"}


def test_advantages_of_losses_that_read_none_are_zero() -> None:
    assert not bool(NoAdvantage()(random_batch()).any())
