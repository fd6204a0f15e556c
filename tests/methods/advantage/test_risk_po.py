"""Identities of the RiskPO card (arXiv 2510.00911)."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.groups import Groups
from polopt.methods.advantage.risk_po import (
    BundleClip,
    Bundler,
    MixedValueAtRisk,
    bundles,
    mixed_value_at_risk,
    track,
)
from polopt.methods.advantage.risk_po_released import released_advantage

SCORES = torch.linspace(-3, 6, 181, dtype=torch.float64)
A, B = -0.5, 2.0
GROUP = torch.arange(5).repeat_interleave(6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def binary(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, (n,), generator=generator(seed)).double()


def a_batch(outcome: torch.Tensor, group: torch.Tensor, size: int = 2) -> Batch:
    n = len(group)
    mask = torch.arange(4) < 1 + torch.arange(n)[:, None] % 4
    old = torch.where(mask, torch.randn(n, 4, generator=generator(1), dtype=torch.float64), torch.nan)
    batch = Batch(
        mask=mask, old_logp=old, rewards=outcome[:, None], group=group, prompt_id=group, weights=mask.double(),
        batch_size=[n],
    )  # fmt: skip
    return Bundler(size=size)(batch, lambda _: generator(2))


def bundle_scores(batch: Batch) -> torch.Tensor:
    bundle = batch.signal("bundle")
    return Groups.of(bundle[bundle >= 0]).sum(batch.outcome()[bundle >= 0])


@pytest.mark.parametrize("a", [-1.0, 0.5, 2.0])
def test_risk_po_without_extra_tail_weight_is_the_lower_tail_up_to_beta(a: float) -> None:
    assert_close(mixed_value_at_risk(SCORES, a, B, 0.0), SCORES.clamp(max=B) - B)
    assert_close(mixed_value_at_risk(SCORES, a, 10.0, 0.0), SCORES - 10.0)


@pytest.mark.parametrize("omega", [0.0, 0.5, 2.0])
def test_risk_po_advantage_is_concave_rising_and_at_most_zero_with_slopes_one_plus_omega_one_zero(
    omega: float,
) -> None:
    found = mixed_value_at_risk(SCORES, A, B, omega)
    slope = found.diff() / SCORES.diff()
    middle = (SCORES[1:] + SCORES[:-1]) / 2
    expected = torch.where(middle < A, 1 + omega, torch.where(middle < B, 1.0, 0.0)).double()
    assert_close(slope, expected, atol=1e-9, rtol=0.0)
    assert (found <= 1e-12).all() and (slope >= -1e-9).all() and (slope.diff() <= 1e-9).all()
    at = mixed_value_at_risk(torch.tensor([A, B, B + 5], dtype=torch.float64), A, B, omega)
    assert_close(at, torch.tensor([A - B, 0.0, 0.0], dtype=torch.float64))


def test_risk_po_advantage_is_exactly_zero_above_the_upper_quantile() -> None:
    assert not mixed_value_at_risk(SCORES[SCORES > B], A, B, 0.5).any()


def test_risk_po_advantage_ignores_a_common_shift_and_is_proportional_to_the_scale() -> None:
    found = mixed_value_at_risk(SCORES, A, B, 0.5)
    assert_close(mixed_value_at_risk(SCORES + 7, A + 7, B + 7, 0.5), found)
    assert_close(mixed_value_at_risk(3 * SCORES, 3 * A, 3 * B, 0.5), 3 * found)


def test_risk_po_with_equal_quantiles_is_the_tail_alone() -> None:
    assert_close(mixed_value_at_risk(SCORES, A, A, 0.5), -1.5 * (A - SCORES).clamp(min=0))


def released(
    outcome: torch.Tensor, group: torch.Tensor, size: int, **options: Any
) -> tuple[torch.Tensor, ...]:
    bundle, bundle_set = bundles(group, size)
    plain = {"alpha": 0.2, "beta": 0.8, "credit": "uniform", "norm_by_std": False} | options
    return released_advantage(outcome, group, bundle, bundle_set, **plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("w_mix", [1.5, 4.0, None])
def test_released_form_is_the_weighted_mean_of_tail_and_middle(w_mix: float | None) -> None:
    outcome = torch.randn(30, generator=generator(), dtype=torch.float64)
    scores, advantage = released(outcome, GROUP, 5, w_mix=w_mix, quantiles=torch.tensor([A, B]), eps=1e-12)
    below = -(A - scores).clamp(min=0)
    middle = (scores - A).clamp(min=0) - (scores - B).clamp(min=0) + A - B
    w = w_mix or 0.0
    assert_close(advantage, ((w / 0.2 * below + middle / 0.6) / (w + 1)).repeat(5))


@pytest.mark.parametrize(("w_mix", "ratio"), [(1.5, 4.5), (1 / 3, 1.0)])
def test_released_form_has_a_tail_to_middle_slope_of_w_times_the_ratio_of_the_levels(
    w_mix: float, ratio: float
) -> None:
    outcome, group = (
        torch.tensor([-2.0, -1.5, 0.5, 1.0], dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
    )
    quantiles = torch.tensor([A, B])
    _, found = released(outcome, group, 1, w_mix=w_mix, quantiles=quantiles, eps=1e-12)
    assert_close((found[1] - found[0]) / (found[3] - found[2]), torch.tensor(ratio, dtype=torch.float64))
    paper = mixed_value_at_risk(outcome, A, B, 0.5)
    assert_close((paper[1] - paper[0]) / (paper[3] - paper[2]), torch.tensor(1.5, dtype=torch.float64))


def test_released_form_takes_the_empirical_quantiles_of_each_set() -> None:
    outcome = torch.randn(30, generator=generator(), dtype=torch.float64)
    scores, found = released(outcome, GROUP, 2)
    expected = []
    for own in scores.view(3, 6):
        quantiles = own.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
        alone = torch.zeros(6, dtype=torch.int64)
        expected.append(released(own, alone, 1, quantiles=quantiles)[1])
    assert_close(found.view(5, 6), torch.stack(expected)[torch.tensor([0, 0, 1, 1, 2])])


def test_released_form_divides_by_the_deviation_of_the_sets_scores() -> None:
    outcome = torch.randn(30, generator=generator(), dtype=torch.float64)
    scores, plain = released(outcome, GROUP, 5)
    assert_close(released(outcome, GROUP, 5, norm_by_std=True)[1], plain / (scores.std() + 1e-6))


def test_risk_seeking_ablation_pays_for_scores_above_the_upper_quantile() -> None:
    outcome, group = SCORES[::10], torch.zeros(19, dtype=torch.int64)
    quantiles = torch.tensor([A, B])
    middle = released(outcome, group, 1, w_mix=None, quantiles=quantiles)[1]
    found = released(outcome, group, 1, upper_weight=1.5, quantiles=quantiles)[1]
    assert_close(found, (1.5 * (outcome - B).clamp(min=0) / (0.2 + 1e-6) + middle) / 2.5)


def test_credit_by_std_and_by_reward_above_the_mean() -> None:
    outcome, table = binary(30), binary(30).view(5, 6)
    _, shared = released(outcome, GROUP, 5)
    spread = table.std(-1, keepdim=True)
    divided = shared.view(5, 6) / (torch.where(spread > 1e-3, spread, 1.0) + 1e-6)
    assert_close(released(outcome, GROUP, 5, credit="std")[1].view(5, 6), divided)
    above = table - table.mean(-1, keepdim=True)
    total = above.sum(0)
    share = torch.where(total.abs() > 1e-6, above / total, 0.2)
    assert_close(released(outcome, GROUP, 5, credit="sum-mean")[1].view(5, 6), shared.view(5, 6) * share)
    constant = torch.ones(30, dtype=torch.float64)
    even = released(constant, GROUP, 5, credit="sum-mean", quantiles=torch.tensor([6.0, 7.0]))[1]
    assert_close(even, released(constant, GROUP, 5, quantiles=torch.tensor([6.0, 7.0]))[1] / 5)


def test_bundles_of_one_prompt_are_the_plain_group() -> None:
    bundle, bundle_set = bundles(GROUP, 1, generator())
    assert torch.equal(bundle_set, GROUP)
    assert torch.equal(bundle.sort().values, torch.arange(30))
    outcome = torch.randn(30, generator=generator(), dtype=torch.float64)
    scores = Groups.of(bundle).sum(outcome)
    assert_close(scores[bundle], outcome)


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_bundles_use_each_answer_once_and_each_prompt_of_the_set_once(size: int) -> None:
    bundle, bundle_set = bundles(GROUP, size, generator())
    outcome = torch.randn(30, generator=generator(), dtype=torch.float64)
    found = Groups.of(bundle)
    assert_close(found.sum(outcome).sum(), outcome.sum())
    assert len(torch.stack([bundle, GROUP]).unique(dim=1).T) == 30
    assert len(found.size) == 6 * -(-5 // size)
    assert torch.equal(bundle_set, GROUP // size)
    assert torch.equal(found.min(bundle_set.double()), found.max(bundle_set.double()))


def test_bundles_are_permuted_by_their_generator_alone() -> None:
    ordered = bundles(GROUP, 5)[0]
    assert torch.equal(ordered, torch.arange(30) % 6)
    one, again, other = (bundles(GROUP, 5, generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, ordered)


def test_surplus_answers_of_ragged_groups_join_no_bundle_and_have_advantage_zero() -> None:
    group = torch.tensor([4, 4, 4, 2, 2, 7, 7, 7])
    outcome = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    batch = a_batch(outcome, group)
    bundle = batch.signal("bundle")
    assert [(bundle[group == g] >= 0).sum().item() for g in (2, 4, 7)] == [2, 2, 3]
    assert_close(bundle_scores(batch).sum(), outcome[bundle >= 0].sum())
    for options in ({}, {"baseline": "mean"}, {"form": "code"}):
        assert not MixedValueAtRisk(**options)(batch)[bundle < 0].any()


@pytest.mark.parametrize("level", [0.2, 0.5, 0.8])
def test_tracker_rests_where_the_share_below_is_its_level(level: float) -> None:
    scores = torch.arange(10, dtype=torch.float64)
    levels = torch.tensor([level], dtype=torch.float64)
    resting = torch.tensor([10 * level - 0.5], dtype=torch.float64)
    assert_close(track(resting, levels, scores, 0.1), resting)
    q = torch.tensor([20.0], dtype=torch.float64)
    for _ in range(2000):
        q = track(q, levels, scores, 0.1)
    assert abs(q.item() - resting.item()) <= 0.5 + 0.1


def test_tracker_moves_by_at_most_its_step_and_counts_strictly() -> None:
    levels = torch.tensor([0.2, 0.8], dtype=torch.float64)
    q = torch.tensor([0.0, 0.0], dtype=torch.float64)
    for scores in (SCORES, SCORES + 100, SCORES - 100):
        moved = (track(q, levels, scores, 0.1) - q).abs()
        assert (moved <= 0.1 * torch.maximum(levels, 1 - levels) + 1e-12).all()
    equal = track(q, levels, torch.zeros(5, dtype=torch.float64), 0.1)
    assert_close(equal, 0.1 * levels)


def covariance(policy: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return policy @ (one * other) - (policy @ one) * (policy @ other)


def test_natural_gradient_step_changes_entropy_by_minus_the_covariance() -> None:
    logits = torch.randn(9, generator=generator(), dtype=torch.float64)
    advantage = mixed_value_at_risk(torch.randn(9, generator=generator(1), dtype=torch.float64), A, B, 0.5)
    policy, rate = logits.softmax(-1), 1e-6

    def entropy(x: torch.Tensor) -> torch.Tensor:
        return -(x.softmax(-1) * x.log_softmax(-1)).sum()

    change = (entropy(logits + rate * advantage) - entropy(logits)) / rate
    assert_close(change, -covariance(policy, policy.log(), advantage), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("omega", [0.0, 0.5, 2.0])
def test_entropy_falls_no_faster_than_with_the_mean_if_both_tails_are_likely(omega: float) -> None:
    scores = torch.linspace(-3, 3, 13, dtype=torch.float64)
    policy = (0.3 * scores.square()).softmax(-1)
    found = covariance(policy, policy.log(), mixed_value_at_risk(scores, -1.5, 1.5, omega))
    assert found < covariance(policy, policy.log(), scores) - 1e-3


def test_entropy_falls_no_faster_than_with_the_mean_if_likelihood_rises_with_the_score() -> None:
    scores = torch.linspace(-3, 3, 13, dtype=torch.float64)
    policy = (0.7 * scores).softmax(-1)
    found = covariance(policy, policy.log(), mixed_value_at_risk(scores, -1.5, 1.5, 0.0))
    assert found < covariance(policy, policy.log(), scores) - 1e-3


def test_quantiles_start_from_the_first_batch_and_serve_the_next_before_its_own_step() -> None:
    part, levels = MixedValueAtRisk(), torch.tensor([0.2, 0.8], dtype=torch.float64)
    first, second = (a_batch(binary(30, seed), GROUP) for seed in (0, 1))
    start = bundle_scores(first).quantile(levels)
    members = first.signal("bundle")
    expected = mixed_value_at_risk(bundle_scores(first), start[0], start[1], 0.5)
    assert_close(part(first)[:, 0], expected[members])
    assert part.quantiles.isnan().all()
    part.observe(first)
    assert_close(part.quantiles, start)
    expected = mixed_value_at_risk(bundle_scores(second), start[0], start[1], 0.5)
    assert_close(part(second)[:, 0], expected[second.signal("bundle")])
    part.observe(second)
    assert_close(part.quantiles, track(start, levels, bundle_scores(second), 0.1))
    other = MixedValueAtRisk()
    other.load_state_dict(part.state_dict())
    assert torch.equal(other(first), part(first))


def test_mean_baseline_centres_the_advantages_over_the_batch() -> None:
    batch = a_batch(binary(30), GROUP)
    plain, centred = MixedValueAtRisk()(batch), MixedValueAtRisk(baseline="mean")(batch)
    assert (plain <= 0).all() and plain.any()
    assert_close(centred, plain - plain.mean())


def test_bundle_clip_averages_clipped_sequence_ratios_inside_bundles_and_then_over_them() -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    batch, surrogate = a_batch(binary(8), group), BundleClip(clip_low=0.1, clip_high=0.2)
    batch.advantages = torch.randn(8, 1, generator=generator(3), dtype=torch.float64).expand(8, 4)
    batch.loss_weight = surrogate.loss_weights(batch)
    logp = batch.old_logp + 0.5 * torch.randn(8, 4, generator=generator(4), dtype=torch.float64)
    bundle, terms = batch.signal("bundle"), []
    for j in bundle[bundle >= 0].unique():
        members = [
            torch.minimum(s * a, s.clamp(0.9, 1.2) * a)
            for i in (bundle == j).nonzero()[:, 0]
            for s, a in [((logp - batch.old_logp)[i][batch.mask[i]].mean().exp(), batch.advantages[i, 0])]
        ]
        terms.append(torch.stack(members).mean())
    logp.requires_grad_()
    loss = surrogate(Evaluation(logp).where(batch.mask), batch)
    assert len(terms) == 5
    assert_close(loss.detach(), -torch.stack(terms).mean())
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.isfinite().all() and not gradient[~batch.mask].any() and not gradient[bundle < 0].any()


def test_constant_scores_single_scores_missing_rewards_and_no_rows_are_defined() -> None:
    constant, lone = torch.full((30,), 0.1, dtype=torch.float64), torch.arange(5)
    for form in ("paper", "code"):
        part = MixedValueAtRisk(form=form)
        assert not part(a_batch(constant, GROUP, size=5)).any()
        assert not part(a_batch(binary(5), lone, size=5)).any()
        missing = torch.where(binary(30) == 0, torch.nan, 1.0).double()
        assert_close(part(a_batch(missing, GROUP)), part(a_batch(binary(30), GROUP)))
        empty = a_batch(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        assert part(empty).shape == (0, 1)
        part.observe(empty)
        assert part.quantiles.isnan().all()


def test_released_baseline_is_the_mean_of_the_middle_by_the_trapezoid_rule() -> None:
    outcome = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    group, bundle, sets = (
        torch.zeros(5, dtype=torch.int64),
        torch.arange(5),
        torch.zeros(5, dtype=torch.int64),
    )
    plain = {"alpha": 0.2, "beta": 0.8, "w_mix": None, "credit": "uniform", "norm_by_std": False, "eps": 0.0}
    a, b = torch.tensor([1.0, 3.0], dtype=torch.float64)
    tracked = torch.linspace(0.0, 4.0, 19, dtype=torch.float64) ** 2 / 4

    def advantage(quantiles: torch.Tensor | None, natural: bool) -> torch.Tensor:
        return released_advantage(
            outcome, group, bundle, sets, natural_baseline=natural, quantiles=torch.stack([a, b]),
            baseline_quantiles=quantiles, **plain,
        )[1]  # fmt: skip

    for natural in (False, True):
        middle = [min(max(float(q) - 1, 0), 2) - 2 * natural for q in tracked]
        integral = sum((one + other) / 2 * 0.05 for one, other in zip(middle, middle[1:], strict=False))
        assert_close(advantage(tracked, natural), advantage(None, natural) - integral / 0.6)


def test_released_baseline_needs_the_released_form() -> None:
    with pytest.raises(ConfigError, match='belongs to form = "code"'):
        MixedValueAtRisk(baseline="quantiles")
    part = MixedValueAtRisk(baseline="quantiles", form="code")
    assert part.quantiles.shape == (21,) and bool(part.quantiles.isnan().all())
