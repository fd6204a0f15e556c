"""Ratios, clips, divergences and masked reductions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polopt.functional.divergence import Estimator, kl_estimate
from polopt.functional.masked import masked_mean, masked_sum, row_mean, standardize, zero_outside
from polopt.functional.ratio import (
    LOG_RATIO_BOUND,
    clipped_surrogate,
    dual_clipped,
    log_ratio,
    sequence_log_ratio,
)

logs = st.floats(-60, 0)
YES = torch.ones(1, 1, dtype=torch.bool)


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@given(logs, logs)
def test_log_ratio_is_the_difference_within_its_bound(logp: float, old: float) -> None:
    expected = min(LOG_RATIO_BOUND, max(-LOG_RATIO_BOUND, logp - old))
    assert float(log_ratio(one(logp), one(old), YES)) == pytest.approx(expected)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_decisions_have_no_ratio_and_no_gradient(garbage: float) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    logp = torch.tensor([[-1.0, garbage], [garbage, garbage]], requires_grad=True)
    old = torch.tensor([[-2.0, 0.0], [garbage, 1.0]])
    for found, expected in (
        (log_ratio(logp, old, mask), [[1.0, 0.0], [0.0, 0.0]]),
        (sequence_log_ratio(logp, old, mask), [[1.0], [0.0]]),
        (kl_estimate(logp, old, mask, "k1"), [[1.0, 0.0], [0.0, 0.0]]),
    ):
        assert found.tolist() == expected
        (gradient,) = torch.autograd.grad(found.exp().sum(), logp)
        assert gradient.isfinite().all()
        assert not gradient[~mask].any()


def test_old_and_reference_values_are_constant() -> None:
    logp, old = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for found in (
        log_ratio(logp, old, mask),
        sequence_log_ratio(logp, old, mask),
        kl_estimate(logp, old, mask),
    ):
        gradients = torch.autograd.grad(found.sum(), [logp, old], allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1] is None


def test_sequence_ratio_of_one_decision_is_its_own() -> None:
    logp, old = torch.tensor([[-0.3, 5.0]]), torch.tensor([[-0.7, 9.0]])
    mask = torch.tensor([[True, False]])
    assert_close(sequence_log_ratio(logp, old, mask), log_ratio(logp, old, mask)[:, :1])


@given(st.floats(0.01, 10), st.floats(-3, 3), st.floats(0, 0.9), st.floats(0, 2))
def test_clip_is_pessimistic(ratio: float, advantage: float, low: float, high: float) -> None:
    loss = float(clipped_surrogate(one(ratio), one(advantage), low, high))
    inside = min(1 + high, max(1 - low, ratio))
    assert loss == pytest.approx(max(-advantage * ratio, -advantage * inside))
    assert loss >= -advantage * ratio - 1e-12


@given(st.floats(0.01, 50), st.floats(-3, 3))
def test_dual_clip_bounds_the_loss_of_bad_decisions_alone(ratio: float, advantage: float) -> None:
    loss = one(-advantage * ratio)
    found = float(dual_clipped(loss, one(advantage), 3.0))
    assert found == pytest.approx(min(float(loss), -3 * advantage) if advantage < 0 else float(loss))
    assert dual_clipped(loss, one(advantage), None) is loss


@given(logs, logs)
def test_divergence_estimates_follow_their_formulas(logp: float, ref: float) -> None:
    x = min(LOG_RATIO_BOUND, max(-LOG_RATIO_BOUND, ref - logp))
    for estimator, expected in (("k1", -x), ("k2", x * x / 2), ("k3", math.expm1(x) - x)):
        found = float(kl_estimate(one(logp), one(ref), YES, estimator))  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(kl_estimate(one(logp), one(ref), YES, "k3")) >= 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimates_are_unbiased_and_k2_has_the_gradient_of_the_divergence(estimator: Estimator) -> None:
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    divergence = (logp.exp() * (logp - reference)).sum()
    mask = torch.ones(1, 3, dtype=torch.bool)
    mean = (logp.detach().exp() * kl_estimate(logp[None], reference[None], mask, estimator)[0]).sum()
    assert_close(mean, divergence)
    (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    expected_k2 = (logp.detach().exp() * kl_estimate(logp[None], reference[None], mask, "k2")[0]).sum()
    assert_close(torch.autograd.grad(expected_k2, logits, retain_graph=True)[0], gradient)
    of_k1 = (logp.detach().exp() * kl_estimate(logp[None], reference[None], mask, "k1")[0]).sum()
    assert_close(torch.autograd.grad(of_k1, logits)[0], torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="estimator: 'k4' is not one of k1, k2, k3"):
        kl_estimate.__wrapped__(one(0), one(0), YES, "k4")  # type: ignore[attr-defined]


@given(st.integers(0, 2**20), st.floats(0, 1), st.sampled_from([0.0, 1e4, -1e8]))
def test_masked_reductions_are_those_of_what_is_left(seed: int, share: float, offset: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 5, generator=draws, dtype=torch.float64) + offset
    mask = torch.rand(4, 5, generator=draws) < share
    dirty, kept = torch.where(mask, values, torch.nan), values[mask]
    assert torch.equal(zero_outside(dirty, mask), torch.where(mask, values, 0.0))
    assert_close(masked_mean(dirty, mask), kept.mean() if len(kept) else torch.zeros((), dtype=torch.float64))
    for row in range(4):
        own = values[row][mask[row]]
        assert_close(masked_sum(dirty, mask)[row], own.sum())
        assert_close(row_mean(dirty, mask)[row], own.mean() if len(own) else own.sum())
    found = standardize(dirty, mask)
    assert not found[~mask].any()
    if len(kept) > 1:
        exact = kept - offset
        expected = (exact - exact.mean()) / (exact.std(correction=0) + 1e-8)
        assert_close(found[mask], expected, rtol=1e-6, atol=1e-6)


@given(st.floats(-1e8, 1e8), st.integers(1, 6))
def test_equal_values_are_standardised_to_exactly_zero(value: float, count: int) -> None:
    for dtype in (torch.float32, torch.float64):
        values = torch.full((count, 2), value, dtype=dtype)
        assert not standardize(values, torch.ones(count, 2, dtype=torch.bool)).any()
