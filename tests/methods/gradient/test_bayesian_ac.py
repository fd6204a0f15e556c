"""Identities of the BAC card (JMLR 17(66), 2016): action values by GPTD, and the gradient through them."""

from typing import cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polopt
from polopt.domain import Plan
from polopt.engine.scores import score_vectors
from polopt.functional.returns import rewards_to_go
from polopt.methods.gradient.bayesian_ac import (
    GPTD,
    bac,
    decision_kernel,
    discounted_rows,
    gaussian_kernel,
    kernel_by_number,
    median_distance,
)
from polopt.methods.gradient.fisher import Fisher
from polopt.methods.gradient.gptd import ActionValues, gptd, sparse_gptd
from polopt.miniature import SumModActor, SumModTask

GAMMA, NOISE = 0.9, 0.4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
SIZE = int(MASK.sum())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES, STATES, REWARDS = randn(SIZE, 3), randn(SIZE, 2, seed=1), randn(*MASK.shape, seed=2)
FISHER = Fisher.of(torch.cov(randn(3, 20, seed=3)))


def kernel(c_state: float = 1.5, c_fisher: float = 0.7) -> Tensor:
    return decision_kernel(SCORES, STATES, FISHER, c_state, c_fisher, 0.8)


def differences() -> Tensor:
    """H: one row for each reward."""
    lengths = [int(n) for n in MASK.sum(-1) if n]
    return torch.block_diag(
        *(
            torch.eye(n, dtype=torch.float64) - GAMMA * torch.eye(n, dtype=torch.float64).roll(1, 1).triu()
            for n in lengths
        )
    )


def test_posterior_is_the_generative_models_and_regression_on_returns() -> None:
    h, k = differences(), kernel()
    gain = h.T @ torch.linalg.inv(h @ k @ h.T + NOISE * h @ h.T)
    found = gptd(REWARDS, MASK, k, GAMMA, NOISE)
    assert_close(found.alpha, gain @ REWARDS[MASK])
    assert_close(found.reduction, gain @ h)
    returns = torch.linalg.solve(h, REWARDS[MASK])
    assert_close(returns, rewards_to_go(REWARDS, MASK, GAMMA)[MASK])
    assert_close(found.alpha, torch.linalg.solve(k + NOISE * torch.eye(SIZE), returns))


def test_without_state_kernel_and_with_the_same_samples_fisher_it_is_shrunk_reinforce() -> None:
    fisher = Fisher.of_rows(SCORES / SIZE**0.5, 0.0)
    k = decision_kernel(SCORES, None, fisher, 0.0, 1.0, 1.0)
    found = gptd(REWARDS, MASK, k, GAMMA, NOISE).gradient(SCORES, fisher, 1.0)
    reinforce = rewards_to_go(REWARDS, MASK, GAMMA)[MASK] @ SCORES / SIZE
    assert_close(found.mean, SIZE / (SIZE + NOISE) * reinforce)


def test_the_state_kernel_drops_out_of_the_gradient() -> None:
    logits, visits = randn(4, 3, seed=4), randn(4, seed=5).softmax(0)
    policy = logits.softmax(-1)
    scores = torch.zeros(4, 3, 4, 3, dtype=torch.float64)  # of all pairs z, with respect to the logits
    for state in range(4):
        scores[state, :, state] = torch.eye(3) - policy[state]
    scores = scores.flatten(2).flatten(0, 1)[:, [0, 1, 3, 4, 6, 7, 9, 10]]  # a basis of them
    states = torch.arange(4.0, dtype=torch.float64).repeat_interleave(3)[:, None]
    share = (visits[:, None] * policy).flatten()
    fisher = Fisher.of((share[:, None] * scores).T @ scores)
    drawn = torch.tensor([0, 4, 5, 7, 8, 11, 2, 4])
    both = decision_kernel(scores, states, fisher, 2.0, 0.6, 1.3)
    rewards, mask = randn(2, 4, seed=6), torch.ones(2, 4, dtype=torch.bool)
    found = gptd(rewards, mask, both[drawn][:, drawn], GAMMA, NOISE)
    integral = (share[:, None] * scores).T @ (both[:, drawn] @ found.alpha)
    assert_close(found.gradient(scores[drawn], fisher, 0.6).mean, integral)
    variance = both - both[:, drawn] @ found.reduction @ both[drawn]
    weighted = share[:, None] * scores
    assert_close(found.gradient(scores[drawn], fisher, 0.6).covariance, weighted.T @ variance @ weighted)


@pytest.mark.parametrize("nu", [-1.0, 1e-9])
def test_recursion_with_every_decision_is_the_closed_form(nu: float) -> None:
    between, own = kernel_by_number(SCORES, STATES, FISHER, 1.5, 0.7, 0.8)
    found, members = sparse_gptd(REWARDS, MASK, between, own, GAMMA, NOISE, nu)
    full = gptd(REWARDS, MASK, kernel(), GAMMA, NOISE)
    assert members.tolist() == list(range(SIZE))
    assert_close(found.alpha, full.alpha, rtol=1e-9, atol=1e-12)
    assert_close(found.reduction, full.reduction, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nu", [0.5, 1.2])
def test_recursion_over_a_dictionary_is_regression_on_projected_kernels(nu: float) -> None:
    between, own = kernel_by_number(SCORES, STATES, FISHER, 1.5, 0.7, 0.8)
    found, members = sparse_gptd(REWARDS, MASK, between, own, GAMMA, NOISE, nu)
    assert 1 < len(members) < SIZE
    k, h = kernel(), differences()
    inside = k[members][:, members]
    onto = torch.zeros(SIZE, len(members), dtype=torch.float64)
    for point in range(SIZE):  # each in the dictionary as it was then
        size = max(1, int((members <= point).sum()))
        onto[point, :size] = torch.linalg.solve(inside[:size, :size], k[members[:size], point])
    exact = (k.diagonal() - (onto @ inside * onto).sum(-1)).clamp(min=0)
    seen = h @ onto
    covariance = seen @ inside @ seen.T + NOISE * h @ h.T
    expected = seen.T @ torch.linalg.solve(covariance, REWARDS[MASK])
    assert bool((exact <= nu + 1e-9).all())
    assert_close(found.alpha, expected, rtol=1e-8, atol=1e-10)
    assert_close(found.reduction, seen.T @ torch.linalg.solve(covariance, seen), rtol=1e-8, atol=1e-10)


def test_covariance_is_positive_shrinks_and_starts_at_the_prior() -> None:
    def covariance(rows: int, noise: float = NOISE) -> Tensor:
        size = int(MASK[:rows].sum())
        found = gptd(REWARDS[:rows], MASK[:rows], kernel()[:size, :size], GAMMA, noise)
        return found.gradient(SCORES[:size], FISHER, 0.7).covariance

    steps = [0.7 * FISHER.matrix(), covariance(1), covariance(2), covariance(4)]
    for before, after in zip(steps, steps[1:], strict=False):
        assert torch.linalg.eigvalsh(after).min() > 0
        assert torch.linalg.eigvalsh(before - after).min() > -1e-10
        assert (before - after).norm() > 1e-3
    assert_close(covariance(4, 1e12), steps[0])
    flat = gptd(REWARDS, MASK, kernel(), GAMMA, 1e12).gradient(SCORES, FISHER, 0.7).mean
    assert flat.abs().max() < 1e-8


def test_values_interpolate_returns_without_noise() -> None:
    found = gptd(REWARDS, MASK, kernel(), GAMMA, 1e-10)
    assert_close(kernel() @ found.alpha, rewards_to_go(REWARDS, MASK, GAMMA)[MASK], rtol=1e-6, atol=1e-6)


def test_no_rewards_no_gradient() -> None:
    found = gptd(torch.zeros_like(REWARDS), MASK, kernel(), GAMMA, NOISE)
    assert not found.alpha.any()


def test_rows_have_the_discounted_second_moment() -> None:
    scores = torch.full((*MASK.shape, 3), torch.nan, dtype=torch.float64)
    scores[MASK] = SCORES
    rows = discounted_rows(scores, MASK, GAMMA)
    power = torch.cat([torch.arange(n) for n in MASK.sum(-1).tolist()])
    assert_close(rows.T @ rows, (GAMMA ** power[:, None] * SCORES).T @ SCORES)


def test_state_kernel() -> None:
    found = gaussian_kernel(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), 5.0)
    assert found.item() == pytest.approx(torch.exp(torch.tensor(-0.5)).item())
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    assert median_distance(torch.zeros(4, 2)) == 1.0
    assert 0.5 < median_distance(randn(5000, 1)) < 1.5


@pytest.mark.parametrize("nu", [None, 0.05])
@pytest.mark.parametrize("c_state", [0.0, 1.0])
def test_gradient_of_the_loss_is_the_posterior_mean(c_state: float, nu: float | None) -> None:
    method = bac().with_parts(advantage=[GPTD(nu=nu, c_state=c_state, noise=0.5, lengthscale=0.7)])
    task = SumModTask(modulus=3, length=3)
    actor = SumModActor(task, width=4)
    batch = actor.rollout(
        task, Plan(torch.arange(4), torch.full((4,), 3)), torch.Generator().manual_seed(0)
    ).batch
    batch.mask[::3, 1:] = False
    batch.decision_scores = score_vectors(actor, batch, per_decision=True)
    batch.set_evaluated("old", actor.evaluate(batch, frozenset({"features"})).detach())
    batch = method.prepare(batch, lambda stream: torch.Generator())
    batch.loss_weight = method.surrogate.loss_weights(batch)
    parameters = list(actor.module.parameters())
    evaluation = actor.evaluate(batch, frozenset({"logp"}))
    found = torch.autograd.grad(
        method.objective(evaluation, batch), parameters, allow_unused=True, materialize_grads=True
    )
    part = cast(GPTD, method.advantage[0])
    scores = batch.decision_scores[batch.mask]
    states = batch.signal("old_features")[batch.mask] if c_state else None
    fisher = part.fisher(discounted_rows(batch.decision_scores, batch.mask, 0.99), len(batch))
    last = torch.zeros(batch.mask.shape, dtype=torch.float64)
    last[torch.arange(len(batch)), batch.mask.sum(-1) - 1] = batch.rewards[:, 0]
    values: ActionValues
    if nu is None:
        whole = decision_kernel(scores, states, fisher, c_state, 1.0, 0.7)
        values = gptd(last, batch.mask, whole, 0.99, 0.5)
    else:
        between, own = kernel_by_number(scores, states, fisher, c_state, 1.0, 0.7)
        values, members = sparse_gptd(last, batch.mask, between, own, 0.99, 0.5, nu)
        scores = scores[members]
    mean = values.gradient(scores, fisher, 1.0).mean
    assert mean.norm() > 1e-3
    assert_close(-torch.cat([g.flatten() for g in found]), mean)


def test_what_is_asked_of_the_domain_follows_the_options() -> None:
    assert GPTD().requires == {"decision_scores", "old_features"}
    assert GPTD(c_state=0.0, dense=True).requires == {"decision_scores", "step_rewards"}
    assert "step_rewards" in polopt.recipe("bac", "control").requires
    assert "step_rewards" not in polopt.recipe("bac").requires
