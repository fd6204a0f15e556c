"""Identities of the OBLR-PO card (arXiv 2511.23310)."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.methods.advantage.oblr_po import (
    OptimalBaseline,
    SignalToNoise,
    optimal_baseline,
    score_sqnorm,
    signal_and_noise,
)

GROUP = torch.tensor([3, 3, 3, 3, 1, 1, 1, 8, 8])
GROUPS = Groups.of(GROUP)


def outcomes_and_weights(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(9, generator=draws, dtype=torch.float64), torch.rand(
        9, generator=draws, dtype=torch.float64
    )


def softmax_bandit(arms: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, rewards of the arms, and the score of each arm with respect to the logits."""
    draws = torch.Generator().manual_seed(4)
    policy = torch.randn(arms, generator=draws, dtype=torch.float64).softmax(-1)
    return policy, torch.randn(arms, generator=draws, dtype=torch.float64), torch.eye(arms) - policy


def variance(policy: torch.Tensor, reward: torch.Tensor, score: torch.Tensor, baseline: float) -> float:
    """Trace of the covariance of (r - b) S, by enumeration."""
    sample = (reward - baseline)[:, None] * score
    mean = policy @ sample
    return float(policy @ sample.square().sum(-1) - mean.square().sum())


def gradients(prompts: int = 6, spread: float = 1.0) -> torch.Tensor:
    noise = torch.randn(prompts, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return 1 + spread * noise


def statistics(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    return g.square().sum(), g.mean(0).square().sum(), len(g)


def share(g: torch.Tensor, **options: float) -> float:
    return SignalToNoise(**{"ema": 0.0} | options).rate_share(*statistics(g))


def test_equal_weights_give_the_group_mean_and_leave_one_out_the_rloo_baseline() -> None:
    outcome, _ = outcomes_and_weights()
    weights = torch.full_like(outcome, 0.3)
    assert_close(optimal_baseline(outcome, GROUP, weights), GROUPS.broadcast(GROUPS.mean(outcome)))
    assert_close(optimal_baseline(outcome, GROUP, weights, True), GROUPS.leave_one_out_mean(outcome))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_two_armed_softmax_has_baseline_one_minus_p(count: int) -> None:
    p = count / 10
    outcome = (torch.arange(10) < count).double()
    probs = torch.tensor([p, 1 - p], dtype=torch.float64).expand(10, 1, 2)
    weights = score_sqnorm(probs, (1 - outcome.long())[:, None])[:, 0]
    found = optimal_baseline(outcome, torch.zeros(10, dtype=torch.int64), weights)
    assert_close(found, torch.full((10,), 1 - p, dtype=torch.float64))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8])
def test_two_armed_softmax_variance_is_zero_at_its_optimal_baseline(p: float) -> None:
    policy, reward = (
        torch.tensor([p, 1 - p], dtype=torch.float64),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    arms = policy, reward, torch.eye(2, dtype=torch.float64) - policy
    assert variance(*arms, 1 - p) == pytest.approx(0, abs=1e-15)
    assert variance(*arms, p) == pytest.approx(2 * p * (1 - p) * (2 * p - 1) ** 2)
    assert variance(*arms, 0) == pytest.approx(2 * p * (1 - p) ** 3)


def test_any_other_constant_baseline_costs_its_squared_distance_times_the_mean_weight() -> None:
    policy, reward, score = softmax_bandit(5)
    weights = policy * score.square().sum(-1)
    best = optimal_baseline(reward, torch.zeros(5, dtype=torch.int64), weights)[0].item()
    for baseline in (-2.0, 0.0, best + 0.1, float(policy @ reward)):
        extra = variance(policy, reward, score, baseline) - variance(policy, reward, score, best)
        assert extra == pytest.approx((baseline - best) ** 2 * float(weights.sum()), rel=1e-9, abs=1e-12)


def test_leave_one_out_gradient_is_exactly_unbiased_and_the_plain_one_is_not() -> None:
    policy, reward, score = softmax_bandit()
    weights, group = score.square().sum(-1), torch.zeros(3, dtype=torch.int64)
    exact = policy @ (reward[:, None] * score)
    for leave_one_out, bias in ((True, False), (False, True)):
        mean = torch.zeros(3, dtype=torch.float64)
        for arms in product(range(3), repeat=3):
            drawn = torch.tensor(arms)
            baseline = optimal_baseline(reward[drawn], group, weights[drawn], leave_one_out)
            advantage = reward[drawn] - baseline
            mean += policy[drawn].prod() * (advantage[:, None] * score[drawn]).mean(0)
        assert bool((mean - exact).abs().max() > 1e-3) is bias
        if not bias:
            assert_close(mean, exact)


def test_weighted_advantages_sum_to_zero_in_every_group() -> None:
    outcome, weights = outcomes_and_weights()
    advantage = outcome - optimal_baseline(outcome, GROUP, weights)
    assert_close(GROUPS.sum(weights * advantage), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_constant_rewards_have_no_advantage(leave_one_out: bool) -> None:
    outcome = GROUP.double() / 10 + 1e6
    found = outcome - optimal_baseline(outcome, GROUP, outcomes_and_weights()[1], leave_one_out)
    assert not found.any()


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_baseline_ignores_the_scale_of_the_weights_and_moves_with_the_rewards(leave_one_out: bool) -> None:
    outcome, weights = outcomes_and_weights()
    found = optimal_baseline(outcome, GROUP, weights, leave_one_out)
    for scale in (1e-9, 1e9):
        assert_close(optimal_baseline(outcome, GROUP, scale * weights, leave_one_out), found)
    shift = GROUP.double()
    assert_close(optimal_baseline(outcome + shift, GROUP, weights, leave_one_out), found + shift)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_baseline_lies_between_the_rewards_used(leave_one_out: bool) -> None:
    outcome, weights = outcomes_and_weights()
    found = optimal_baseline(outcome, GROUP, weights, leave_one_out)
    for row in range(9):
        used = (GROUP[row] == GROUP) & ~(torch.arange(9) == row if leave_one_out else torch.zeros(9).bool())
        assert outcome[used].min() - 1e-12 <= found[row] <= outcome[used].max() + 1e-12


def test_signal_and_noise_add_up_to_the_square_of_the_mean_gradient() -> None:
    g = gradients()
    signal, noise = signal_and_noise(*statistics(g))
    assert_close(signal + noise, g.mean(0).square().sum())
    assert_close(noise, (g - g.mean(0)).square().sum() / (6 * 5))


def test_rate_share_is_snr_over_one_plus_snr_between_its_limits() -> None:
    g = gradients(spread=0.7)
    signal, noise = signal_and_noise(*statistics(g))
    snr = signal / noise
    assert share(g) == pytest.approx(float(snr / (1 + snr)))
    assert share(g, lr_min_share=0.999) == 0.999


def test_rate_is_full_if_all_gradients_agree_and_least_if_noise_covers_the_signal() -> None:
    same = gradients()[:1].expand(5, -1)
    assert share(same) == pytest.approx(1.0, abs=1e-12)
    assert share(same * torch.tensor([1.0, 1, 1, 1, 1.1])[:, None]) < 1 - 1e-4
    opposed = gradients(2)
    assert share(torch.cat([opposed, -opposed]), lr_min_share=0.05) == 0.05
    assert share(torch.zeros(3, 4), lr_min_share=0.05) == 0.05


def test_rate_is_invariant_to_the_scale_of_the_gradients() -> None:
    for scale in (1e-6, 1e6):
        assert share(scale * gradients()) == pytest.approx(share(gradients()), rel=1e-9)


def test_rate_grows_with_the_prompts_at_a_fixed_law() -> None:
    two = torch.tensor([[2.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    found = [share(two.repeat(count, 1)) for count in (1, 2, 8, 64)]
    assert all(a < b for a, b in zip(found, found[1:], strict=False))


def test_proxy_is_the_squared_score_norm_with_its_extreme_values() -> None:
    logits = torch.randn(
        5, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=True
    )
    for action in range(5):
        (score,) = torch.autograd.grad(logits.log_softmax(-1)[action], logits)
        found = score_sqnorm(logits.detach().softmax(-1).view(1, 1, 5), torch.tensor([[action]]))
        assert_close(found.squeeze(), score.square().sum())
    certain = torch.tensor([[[1.0, 0.0, 0.0]]])
    assert score_sqnorm(certain, torch.tensor([[0]])).item() == 0
    assert score_sqnorm(certain, torch.tensor([[1]])).item() == 2
    assert score_sqnorm(torch.full((1, 1, 8), 1 / 8), torch.tensor([[3]])).item() == pytest.approx(1 - 1 / 8)


def test_expected_signal_and_noise_are_the_true_ones() -> None:
    law, prompts = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 3
    g = gradients(3)
    mean = torch.zeros(2, dtype=torch.float64)
    for drawn in product(range(3), repeat=prompts):
        rows = list(drawn)
        mean += law[rows].prod() * torch.stack(signal_and_noise(*statistics(g[rows])))
    centre = law @ g
    spread = law @ (g - centre).square().sum(-1) / prompts
    assert_close(mean, torch.stack([centre.square().sum(), spread]))


def test_averages_are_bias_corrected_and_of_unclipped_estimates() -> None:
    part, ema = SignalToNoise(ema=0.9), 0.9
    batches = [gradients(spread=0.3), torch.cat([gradients(), -gradients()]), gradients(spread=0.5)]
    found = [torch.stack(signal_and_noise(*statistics(g))) for g in batches]
    assert found[1][0] < 0
    average = torch.zeros(2, dtype=torch.float64)
    for step, (g, estimate) in enumerate(zip(batches, found, strict=True), start=1):
        average = ema * average + (1 - ema) * estimate
        signal, noise = average / (1 - ema**step)
        rate = part.rate_share(*statistics(g))
        assert_close(torch.stack(part.corrected()), torch.stack([signal, noise]))
        assert rate == pytest.approx(float(signal.clamp(min=0) / (signal.clamp(min=0) + noise)))
    other = SignalToNoise(ema=0.9)
    other.load_state_dict(part.state_dict())
    assert other.rate_share(*statistics(batches[0])) == part.rate_share(*statistics(batches[0]))


def test_a_single_prompt_leaves_the_statistics_and_the_rate_is_least_before_any() -> None:
    part = SignalToNoise(lr_min_share=0.02)
    assert part.rate_share(*statistics(gradients(1))) == 0.02
    known = part.rate_share(*statistics(gradients(6)))
    assert known > 0.02
    assert part.rate_share(*statistics(gradients(1))) == known
    assert part.updates == 1


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_single_samples_have_no_advantage_and_weights_of_zero_give_the_plain_mean(
    leave_one_out: bool,
) -> None:
    outcome, _ = outcomes_and_weights()
    nothing = torch.zeros(9, dtype=torch.float64)
    expected = GROUPS.leave_one_out_mean(outcome) if leave_one_out else GROUPS.broadcast(GROUPS.mean(outcome))
    assert_close(optimal_baseline(outcome, GROUP, nothing, leave_one_out), expected)
    alone = optimal_baseline(outcome, torch.arange(9), 1 + nothing, leave_one_out)
    assert torch.equal(alone, outcome)
    assert_close(optimal_baseline(outcome[:2], GROUP[:2], torch.tensor([2.0, 0.0]), True), outcome[[1, 0]])


def test_advantage_part_sums_the_decisions_that_count_and_takes_missing_rewards_and_no_rows() -> None:
    draws = torch.Generator().manual_seed(7)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3], [2]])
    norms = torch.rand(4, 4, generator=draws, dtype=torch.float64)
    rewards, group = torch.tensor([[1.0], [0.0], [torch.nan], [1.0]]), torch.zeros(4, dtype=torch.int64)

    def advantages(rows: slice) -> torch.Tensor:
        batch = Batch(
            mask=mask[rows], old_logp=torch.zeros(4, 4)[rows], rewards=rewards[rows], group=group[rows],
            prompt_id=group[rows], batch_size=[len(group[rows])],
        )  # fmt: skip
        batch.set_signal("old_score_sqnorm", torch.where(mask, norms, torch.nan)[rows])
        return OptimalBaseline()(batch)

    weights = (norms * mask).sum(-1)
    outcome = rewards[:, 0].double().nan_to_num()
    assert_close(advantages(slice(None))[:, 0], outcome - weights @ outcome / weights.sum())
    assert advantages(slice(0)).shape == (0, 1)
