"""Identities of the BPG card (JMLR 17(66), 2016): trajectories, Fisher matrix, sparsification, the step."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.domain import Plan
from polopt.engine.scores import score_vectors
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.methods.gradient.ascent import Ascent
from polopt.methods.gradient.bayesian_pg import (
    BayesianQuadrature,
    Model,
    bayesian_quadrature,
    bpg,
    bpg_natural,
    fisher_kernel,
    sparse_quadrature,
)
from polopt.methods.gradient.fisher import Fisher, FisherEstimator, fisher_update
from polopt.miniature import SumModActor, SumModTask

MODELS: tuple[Model, ...] = (1, 2)


def data(count: int, parameters: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, returns and a positive definite matrix."""
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, parameters, generator=draws, dtype=torch.float64)
    root = torch.randn(parameters, parameters, generator=draws, dtype=torch.float64)
    returns = torch.randn(count, generator=draws, dtype=torch.float64)
    return scores, returns, root @ root.T + 0.3 * torch.eye(parameters, dtype=torch.float64)


def psd(matrix: Tensor) -> bool:
    return bool(torch.linalg.eigvalsh(matrix).min() > -1e-9)


def test_model_2_has_a_primal_and_a_dual_form() -> None:
    scores, returns, matrix = data(7, 4)
    found = bayesian_quadrature(scores, returns, Fisher.of(matrix), 2, 0.3).mean
    primal = matrix @ torch.linalg.solve(scores.T @ scores + 0.3 * matrix, scores.T @ returns)
    assert_close(found, primal)


@pytest.mark.parametrize("noise", [0.1, 5.0])
def test_model_2_with_the_same_samples_fisher_is_shrunk_monte_carlo(noise: float) -> None:
    scores, returns, _ = data(9, 4)
    fisher = Fisher.of_rows(scores / 3, 0.0)
    found = bayesian_quadrature(scores, returns, fisher, 2, noise).mean
    assert_close(found, 9 / (9 + noise) * (returns @ scores) / 9)


def gaussian_nodes() -> tuple[Tensor, Tensor]:
    """Scores of actions a ~ N(0, 1) at the nodes of a quadrature, and its weights: u = (a, a^2 - 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    actions = torch.tensor(nodes)
    return torch.stack([actions, actions.square() - 1], -1), torch.tensor(weights / weights.sum())


@pytest.mark.parametrize("model", MODELS)
def test_the_closed_form_integrals_are_the_integrals(model: Model) -> None:
    fisher = Fisher.of(torch.diag(torch.tensor([1.0, 2.0])))
    nodes, weights = gaussian_nodes()
    actions = torch.tensor([-1.2, 0.4, 2.1, 0.9], dtype=torch.float64)
    scores = torch.stack([actions, actions.square() - 1], -1)
    found = bayesian_quadrature(scores, actions, fisher, model, 0.05)
    kernel = fisher_kernel(fisher.products(torch.cat([nodes, scores])), model)
    among, cross, own = kernel[:40, :40], kernel[:40, 40:], kernel[40:, 40:]
    inverse = torch.linalg.inv(own + 0.05 * torch.eye(4))
    factor = torch.ones(40, 1) if model == 1 else nodes  # what multiplies the unknown under the integral
    observed = actions[:, None] * scores if model == 1 else actions[:, None]
    onto = (weights[:, None] * factor).T @ cross
    mean = (onto @ inverse @ observed).flatten()
    weighted = weights[:, None] * factor
    covariance = weighted.T @ among @ weighted - onto @ inverse @ onto.T
    assert_close(found.mean, mean)
    assert_close(found.covariance, covariance * torch.eye(2) if model == 1 else covariance)


def test_the_mean_of_b_is_one_plus_the_parameters() -> None:
    nodes, weights = gaussian_nodes()
    products = Fisher.of(torch.diag(torch.tensor([1.0, 2.0]))).products(nodes)
    assert (weights @ (1 + products.diagonal())).item() == pytest.approx(3.0)


@pytest.mark.parametrize("model", MODELS)
def test_covariance_is_positive_and_shrinks_with_every_trajectory(model: Model) -> None:
    scores, returns, matrix = data(8, 3)
    fisher = Fisher.of(matrix)
    covariances = [
        bayesian_quadrature(scores[:count], returns[:count], fisher, model, 0.2).covariance
        for count in range(1, 9)
    ]
    prior = 4 * torch.eye(3) if model == 1 else matrix
    for before, after in zip([prior, *covariances], covariances, strict=False):
        assert psd(after) and psd(before - after)
        assert (before - after).norm() > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_infinite_noise_leaves_the_prior(model: Model) -> None:
    scores, returns, matrix = data(8, 3)
    found = bayesian_quadrature(scores, returns, Fisher.of(matrix), model, 1e12)
    prior = 4 * torch.eye(3, dtype=torch.float64) if model == 1 else matrix
    assert_close(found.covariance, prior, rtol=1e-6, atol=1e-6)
    assert found.mean.abs().max() < 1e-8


@pytest.mark.parametrize("model", MODELS)
def test_mean_is_linear_in_returns_and_has_no_baseline_of_its_own(model: Model) -> None:
    scores, returns, matrix = data(8, 3)

    def mean(values: Tensor) -> Tensor:
        return bayesian_quadrature(scores, values, Fisher.of(matrix), model, 0.2).mean

    assert_close(mean(torch.zeros(8, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))
    assert_close(mean(2 * returns + 1), 2 * mean(returns) + mean(torch.ones_like(returns)))
    assert (mean(returns + 1) - mean(returns)).norm() > 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_weights_do_not_depend_on_the_parametrisation(model: Model) -> None:
    scores, returns, matrix = data(8, 3)
    change = data(3, 3, seed=5)[0]
    plain = bayesian_quadrature(scores, returns, Fisher.of(matrix), model, 0.2)
    moved = bayesian_quadrature(scores @ change.T, returns, Fisher.of(change @ matrix @ change.T), model, 0.2)
    assert_close(moved.weights, plain.weights)
    assert_close(moved.mean, change @ plain.mean)


@pytest.mark.parametrize(("model", "count"), [(1, 9), (2, 4)])
def test_sparsification_without_threshold_is_the_full_solution(model: Model, count: int) -> None:
    scores, returns, matrix = data(count, 4)
    full = bayesian_quadrature(scores, returns, Fisher.of(matrix), model, 0.2)
    sparse, kept = sparse_quadrature(scores, returns, Fisher.of(matrix), model, 0.2, 1e-12)
    assert kept.members.tolist() == list(range(count))
    assert_close(sparse.weights, full.weights)
    assert_close(sparse.covariance, full.covariance)


@pytest.mark.parametrize("model", MODELS)
def test_dependent_trajectories_stay_out_of_the_dictionary_and_lose_nothing(model: Model) -> None:
    scores, returns, matrix = data(3, 4)
    scores, returns = scores.repeat(3, 1), data(9, 1)[1]
    full = bayesian_quadrature(scores, returns, Fisher.of(matrix), model, 0.2)
    sparse, kept = sparse_quadrature(scores, returns, Fisher.of(matrix), model, 0.2, 1e-8)
    assert kept.members.tolist() == [0, 1, 2]
    assert_close(sparse.mean, full.mean)
    assert_close(sparse.covariance, full.covariance)


def test_projections_are_the_definition() -> None:
    scores, returns, matrix = data(30, 2)
    fisher = Fisher.of(matrix)
    _, kept = sparse_quadrature(scores, returns, fisher, 1, 0.1, 0.5)
    kernel = fisher_kernel(fisher.products(scores), 1)
    seen: list[int] = []
    for point in range(30):
        onto = torch.linalg.solve(kernel[seen][:, seen], kernel[seen, point])
        distance = kernel[point, point] - kernel[point, seen] @ onto
        assert_close(kept.distances[point], distance, rtol=1e-8, atol=1e-8)
        if distance > 0.5 or not seen:
            seen.append(point)
            assert kept.projections[point].nonzero()[:, 0].tolist() == [len(seen) - 1]
        else:
            assert_close(kept.projections[point, : len(seen)], onto)
    assert kept.members.tolist() == seen and 1 < len(seen) < 30


def test_first_point_always_enters() -> None:
    scores, returns, matrix = data(4, 2)
    found, kept = sparse_quadrature(scores, returns, Fisher.of(matrix), 1, 0.1, 1e9)
    assert kept.members.tolist() == [0]
    assert found.weights.isfinite().all()
    zero = torch.zeros_like(scores)
    assert sparse_quadrature(zero, returns, Fisher.of(matrix), 2, 0.1, 0.0)[0].mean.tolist() == [0.0, 0.0]


def test_fisher_recursion_is_the_mean_with_the_prior_as_one_sample() -> None:
    scores = data(12, 3)[0]
    eye = torch.eye(3, dtype=torch.float64)
    fisher, inverse = 0.5 * eye, 2 * eye
    for number, score in enumerate(scores, 1):
        fisher, inverse = fisher_update(fisher, inverse, score, number)
    assert_close(fisher, (0.5 * eye + scores.T @ scores) / 13)
    assert_close(inverse @ fisher, eye)


@pytest.mark.parametrize("rows", [3, 6, 20])
def test_fisher_by_its_directions_is_the_written_out_matrix(rows: int) -> None:
    scores, vectors = data(rows, 6)[0], data(4, 6, seed=1)[0]
    fisher = Fisher.of_rows(scores, 0.01)
    matrix = scores.T @ scores + 0.01 * torch.eye(6, dtype=torch.float64)
    assert_close(fisher.matrix(), matrix)
    assert_close(fisher.solve(vectors), torch.linalg.solve(matrix, vectors.T).T, rtol=1e-8, atol=1e-8)
    assert_close(Fisher.of(matrix).solve(vectors), fisher.solve(vectors), rtol=1e-8, atol=1e-8)


def test_singular_fisher_matrices_are_refused() -> None:
    with pytest.raises(ConfigError, match="ridge"):
        Fisher.of_rows(data(3, 6)[0], 0.0)
    with pytest.raises(ConfigError, match="ridge"):
        Fisher.of(torch.diag(torch.tensor([1.0, 0.0])))


def test_fisher_estimate_forgets_geometrically() -> None:
    batches = [data(size, 5, seed=size)[0] for size in (4, 6, 3)]
    estimator = FisherEstimator(ridge=0.1, memory=0.5, rank=10)
    for scores in batches[:2]:
        estimator.observe(scores, len(scores))
    first, second, third = (scores.T @ scores for scores in batches)
    total = 0.25 * 4 + 0.5 * 6 + 3
    expected = (0.25 * first + 0.5 * second + third) / total + 0.1 * torch.eye(5)
    assert_close(estimator(batches[2], 3).matrix(), expected)


def test_fisher_estimate_can_be_supplied() -> None:
    scores, _, matrix = data(6, 3)
    estimator = FisherEstimator(ridge=0.1, memory=0.5, rank=10)
    estimator.supply(matrix)
    assert_close(estimator(scores, 6).matrix(), matrix)


def rollout(method: Method) -> tuple[SumModActor, Batch]:
    """An iteration's batch, prepared, and the actor behind it."""
    task = SumModTask(modulus=3, length=2)
    actor = SumModActor(task, width=4)
    plan = Plan(torch.arange(4), torch.full((4,), 3))
    batch = actor.rollout(task, plan, torch.Generator().manual_seed(0)).batch
    batch.scores = score_vectors(actor, batch, per_decision=False)
    batch = method.prepare(batch, lambda stream: torch.Generator())
    batch.loss_weight = method.surrogate.loss_weights(batch)
    return actor, batch


@pytest.mark.parametrize("options", [{}, {"model": 2}, {"tau": 1.0}, {"model": 2, "tau": 0.5, "memory": 0.0}])
def test_gradient_of_the_loss_is_the_posterior_mean(options: dict) -> None:
    method = bpg().with_parts(advantage=[BayesianQuadrature(**options)])
    actor, batch = rollout(method)
    evaluation = actor.evaluate(batch, frozenset({"logp"}))
    parameters = list(actor.module.parameters())
    found = torch.autograd.grad(
        method.objective(evaluation, batch), parameters, allow_unused=True, materialize_grads=True
    )
    mean = cast(BayesianQuadrature, method.advantage[0]).posterior(batch).mean
    assert mean.norm() > 1e-3
    assert_close(-torch.cat([g.flatten() for g in found]), mean)


def test_natural_step_is_the_gradient_in_the_fisher_metric() -> None:
    method = bpg_natural()
    actor, batch = rollout(method)
    parameters = list(actor.module.parameters())
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    optimizer = method.optimizer.build(parameters, 0.1)
    method.objective(actor.evaluate(batch, frozenset({"logp"})), batch).backward()
    optimizer.step()
    scores = batch.scores[:, 0].double()
    fisher = scores.T @ scores / len(scores) + 1e-3 * torch.eye(scores.shape[1], dtype=torch.float64)
    mean = cast(BayesianQuadrature, method.advantage[0]).posterior(batch).mean
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    assert_close(moved, 0.1 * torch.linalg.solve(fisher, mean), rtol=1e-7, atol=1e-9)


def test_rate_decays_with_the_updates() -> None:
    _, batch = rollout(bpg())
    part = Ascent(decay=500.0)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = part.build([parameter], 0.5)
    for update in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(2)
        optimizer.step()
        part.after_step(Evaluation(batch.old_logp), batch)
        assert_close(before - parameter.detach(), torch.full((2,), 0.5 * 500 / (500 + update)))


def test_trajectories_without_decisions_do_not_count() -> None:
    method = bpg()
    _, batch = rollout(method)
    part = cast(BayesianQuadrature, method.advantage[0])
    plain = part(batch)
    empty = batch[:2].clone()
    empty.mask = torch.zeros_like(empty.mask)
    empty.rewards = torch.full_like(empty.rewards, 100.0)
    found = part(cast(Batch, torch.cat([batch, empty], 0)))  # type: ignore[arg-type]
    assert_close(found[:-2], plain)
    assert not found[-2:].any()
