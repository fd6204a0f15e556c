"""Identities of the REAL card (arXiv 2602.05630)."""

import math

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.methods.preference.real import RewardsAsLabels, Variant, real_loss

GROUP = torch.zeros(6, dtype=torch.int64)
LABELS = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
EVERYONE = torch.ones(6, dtype=torch.bool)
VARIANTS: tuple[Variant, ...] = ("real", "bce", "product")


def loss_and_weights(
    logits: torch.Tensor, variant: Variant = "real", tau: float = 0.5, labels: torch.Tensor = LABELS
):
    logits = logits.clone().requires_grad_()
    loss = real_loss(
        logits,
        labels,
        torch.zeros(len(labels), dtype=torch.int64),
        torch.ones(len(labels)).bool(),
        tau,
        variant,
    )
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def logits(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_real_on_policy_loss_and_weights() -> None:
    loss, weights = loss_and_weights(torch.zeros(6, dtype=torch.float64))
    assert loss.item() == pytest.approx(2 * math.log(4))
    assert_close(weights, torch.where(LABELS > 0, -1 / (0.5 * 4), 1 / (0.5 * 4)).double())


def test_bce_on_policy_weights_are_equal() -> None:
    weights = loss_and_weights(torch.zeros(6, dtype=torch.float64), "bce")[1]
    assert_close(weights.abs(), torch.full((6,), 1 / (2 * 0.5) / 6, dtype=torch.float64))


def test_real_weights_are_bounded_by_one_over_tau_in_each_class() -> None:
    for seed in range(20):
        weights = loss_and_weights(logits(seed, 5.0))[1]
        assert weights[LABELS > 0].abs().sum() < 2 and weights[LABELS == 0].abs().sum() < 2


def test_real_weight_of_a_correct_rollout_falls_and_of_a_wrong_one_rises_with_its_own_logit() -> None:
    for row, sign in ((0, 1), (2, -1)):
        weights = []
        for value in torch.linspace(-4, 4, 17):
            moved = logits()
            moved[row] = value
            weights.append(loss_and_weights(moved)[1][row].abs().item() * sign)
        assert all(a > b for a, b in zip(weights, weights[1:], strict=False))


def test_real_and_product_are_related_by_their_exponentials() -> None:
    x = logits()
    up, down = (-x[LABELS > 0] / 0.5).exp().sum(), (x[LABELS == 0] / 0.5).exp().sum()
    assert_close(loss_and_weights(x)[0].exp(), 1 + up + down + up * down)
    assert_close(loss_and_weights(x, "product")[0].exp(), 1 + up * down)


def test_product_is_invariant_to_a_shift_of_all_logits_and_real_is_not() -> None:
    assert_close(loss_and_weights(logits() + 1, "product")[0], loss_and_weights(logits(), "product")[0])
    assert (loss_and_weights(logits() + 1)[0] - loss_and_weights(logits())[0]).abs() > 1e-3


def test_real_of_one_rollout_per_class_is_twice_the_mean_cross_entropy() -> None:
    labels, x = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.3, -0.7], dtype=torch.float64)
    assert_close(loss_and_weights(x, labels=labels)[0], 2 * loss_and_weights(x, "bce", labels=labels)[0])


def test_degenerate_groups_dilute_real_and_leave_bce_alone() -> None:
    x, labels = torch.cat([logits(), logits(1)[:2]]), torch.cat([LABELS, torch.ones(2, dtype=torch.float64)])
    group, counted = torch.cat([GROUP, GROUP[:2] + 5]), torch.ones(8, dtype=torch.bool)
    assert_close(real_loss(x, labels, group, counted), loss_and_weights(logits())[0] / 2)
    assert_close(real_loss(x, labels, group, counted, variant="bce"), loss_and_weights(logits(), "bce")[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_labels_and_negating_logits_changes_nothing(variant: Variant) -> None:
    assert_close(
        loss_and_weights(-logits(), variant, labels=1 - LABELS)[0], loss_and_weights(logits(), variant)[0]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_and_labels_of_groups_do_not_matter(variant: Variant) -> None:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    found = real_loss(logits()[order], LABELS[order], GROUP[order] + 9, EVERYONE, variant=variant)
    assert_close(found, loss_and_weights(logits(), variant)[0])


def test_small_tau_is_a_hinge_on_the_worst_rollout_of_each_class() -> None:
    x, tau = logits(), 1e-4
    hinge = (-x[LABELS > 0]).max().clamp(min=0) + x[LABELS == 0].max().clamp(min=0)
    assert_close(tau * loss_and_weights(x, tau=tau)[0], hinge, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_valid_group_loss_and_gradient_are_zero(variant: Variant) -> None:
    loss, weights = loss_and_weights(logits(), variant, labels=torch.ones(6, dtype=torch.float64))
    assert loss == 0 and not weights.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_huge_logits_stay_finite(variant: Variant) -> None:
    loss, weights = loss_and_weights(logits(scale=1e4), variant)
    assert loss.isfinite() and weights.isfinite().all()


def surrogate_loss(rewards: torch.Tensor, variant: Variant = "real", **fields: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(6, 2).bool()
    batch = Batch(
        mask=mask, old_logp=torch.zeros(6, 2).double(), rewards=rewards, group=GROUP, prompt_id=GROUP,
        loss_weight=mask.double(), batch_size=[6], **fields,
    )  # fmt: skip
    return RewardsAsLabels(variant=variant)(Evaluation(logits()[:, None].expand(6, 2)), batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_several_rewards_is_the_sum_of_their_losses(variant: Variant) -> None:
    other = torch.tensor([0.0, 1.0, 1.0, torch.nan, 0.0, 1.0], dtype=torch.float64)
    steps = torch.tensor([[0.5, 0.5], [0, 0], [1, 0], [0, 0], [-1, 1], [0, 1]], dtype=torch.float64)
    found = surrogate_loss(torch.stack([LABELS, other], 1), variant, step_rewards=steps)
    known = other.isfinite()
    expected = (
        loss_and_weights(logits(), variant)[0]
        + real_loss(logits(), other, GROUP, known, variant=variant)
        + loss_and_weights(logits(), variant, labels=steps.sum(1))[0]
    )
    assert_close(found, expected)


def test_a_penalty_beside_the_label_changes_nothing() -> None:
    penalty = torch.tensor([0.0, -0.3, 0.0, -1.0, 0.0, -0.2], dtype=torch.float64)
    assert_close(surrogate_loss(torch.stack([LABELS, penalty], 1)), surrogate_loss(LABELS[:, None]))


def test_large_tau_tends_to_the_on_policy_weights() -> None:
    tau = 1e6
    weights = loss_and_weights(logits(), tau=tau)[1]
    on_policy = loss_and_weights(torch.zeros(6, dtype=torch.float64), tau=tau)[1]
    assert_close(tau * weights, tau * on_policy, atol=1e-5, rtol=0.0)
