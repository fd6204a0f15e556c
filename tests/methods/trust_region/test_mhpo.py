"""Identities of the MHPO card (arXiv 2603.16929)."""

import math

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Evaluation
from polopt.methods.trust_region.mhpo import ModulatedHazard, modulate
from polopt.testing import random_batch

DEFAULTS = {"c": 1.5, "k_pos": 1.5, "lambda_pos": 1.0, "k_neg": 2.0, "lambda_neg": 0.8}
X = torch.linspace(-8, 8, 2001, dtype=torch.float64)


def multiplier(x: torch.Tensor, **options: float) -> torch.Tensor:
    """d weight / d log-ratio by autograd."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(modulate(x, **DEFAULTS | options).weight.sum(), x)  # type: ignore[arg-type]
    return gradient


def test_mhpo_weight_at_ratio_one() -> None:
    found = modulate(torch.zeros(1, dtype=torch.float64), **DEFAULTS)
    assert found.psi.item() == 0.0
    assert found.zeta.item() == pytest.approx(1.327791, abs=1e-6)
    assert found.weight.item() == pytest.approx(0.265062, abs=1e-6)


def test_mhpo_without_hazard_and_wide_range_is_the_importance_ratio() -> None:
    weight = modulate(X, **DEFAULTS | {"c": 1e9}, use_hazard=False).weight
    assert_close(weight, X.exp())


def test_mhpo_gradient_is_the_closed_form() -> None:
    found = modulate(X, **DEFAULTS)
    assert_close(multiplier(X), found.weight * (1 - (found.psi / 1.5).square()), rtol=1e-10, atol=1e-14)


def test_mhpo_multiplier_is_positive_and_bounded() -> None:
    gradient = multiplier(X)
    assert (gradient > 0).all() and (gradient <= math.exp(1.5)).all()


def test_mhpo_largest_multiplier_of_the_modulator_alone() -> None:
    c = 1.5
    y = (math.sqrt(1 + c * c) - 1) / c
    gradient = multiplier(X, use_hazard=False)
    assert gradient.max().item() == pytest.approx(math.exp(c * y) * (1 - y * y), rel=1e-4)
    assert gradient.max().item() == pytest.approx(1.592512, rel=1e-4)
    assert X[gradient.argmax()].exp().item() == pytest.approx(2.450029, rel=1e-2)


def test_mhpo_multiplier_with_the_default_hazard() -> None:
    gradient = multiplier(X)
    assert gradient.max().item() == pytest.approx(0.395814, rel=1e-4)
    at = multiplier(torch.tensor([math.log(2), math.log(0.5)], dtype=torch.float64))
    assert_close(at, torch.tensor([0.390653, 0.054422], dtype=torch.float64), atol=1e-5, rtol=0.0)


def test_mhpo_symmetric_hazard_is_even() -> None:
    even = DEFAULTS | {"k_neg": 1.5, "lambda_neg": 1.0}
    assert_close(modulate(X, **even).zeta, modulate(-X, **even).zeta)


def test_mhpo_is_linear_in_the_advantages_and_silent_without() -> None:
    batch = random_batch(seed=0)
    batch.weights = batch.mask.to(batch.old_logp)
    surrogate = ModulatedHazard()
    batch.loss_weight = surrogate.loss_weights(batch)
    evaluation = Evaluation(batch.old_logp + 0.3).where(batch.mask)

    def loss(advantages: torch.Tensor) -> torch.Tensor:
        batch.advantages = advantages
        return surrogate(evaluation, batch)

    one, other = torch.randn(2, *batch.mask.shape, generator=torch.Generator().manual_seed(0)).to(
        batch.old_logp
    )
    assert_close(loss(2 * one - 3 * other), 2 * loss(one) - 3 * loss(other))
    assert loss(torch.zeros_like(one)) == 0
