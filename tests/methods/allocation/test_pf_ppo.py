"""Identities of the PF-PPO card (arXiv 2409.06957)."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polopt
from polopt.batch import Batch
from polopt.errors import PoloptError
from polopt.functional.groups import Groups
from polopt.methods.allocation.pf_ppo import PolicyFiltration, drawn_shares, filter_weights, r_squared
from polopt.methods.classics.dr_grpo import GroupCentred
from polopt.methods.classics.ppo import PPOClip
from polopt.testing import TinyActor, random_batch

RANKED = ("br", "bw", "bon", "none")
GROUP = torch.tensor([3, 0, 3, 7, 3, 0, 3, 3])
"""Groups of five, two and one, scattered."""
REWARDS = torch.tensor([0.3, -1.0, 0.9, 0.2, -0.4, 2.0, 0.9, 0.1], dtype=torch.float64)


def draw(_: str = "", seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weigh(batch: Batch, **options: Any) -> Tensor:
    return PolicyFiltration(**options)(batch, draw)[:, 0]


def outcome_batch(rewards: Tensor, group: Tensor) -> Batch:
    rows = len(rewards)
    mask = torch.ones(rows, 1, dtype=torch.bool)
    zeros = torch.zeros(rows, 1, dtype=torch.float64)
    return Batch(
        mask=mask, old_logp=zeros, rewards=rewards[:, None], group=group, prompt_id=group, batch_size=[rows]
    )


def loss(selection: PolicyFiltration | None) -> Tensor:
    method = polopt.Method(
        advantage=GroupCentred(), selection=selection, surrogate=PPOClip(aggregation="group_mean")
    )
    batch = random_batch(rewards="graded")
    batch = method.prepare(batch[batch.mask.any(-1)], draw)
    batch.loss_weight = method.surrogate.loss_weights(batch)
    return method.objective(TinyActor(0, noise=0.5).evaluate(batch, frozenset()), batch)


def test_no_filter_is_ppo_on_all_responses() -> None:
    assert_close(loss(PolicyFiltration(strategy="none")), loss(None))
    assert not torch.isclose(loss(PolicyFiltration(strategy="bw")), loss(None))


def test_strategies_coincide_with_one_response() -> None:
    for strategy in RANKED:
        assert filter_weights(REWARDS, torch.arange(8), strategy).tolist() == [1.0] * 8


def test_best_and_random_best_and_worst_and_no_filter_coincide_with_two_responses() -> None:
    for strategy in ("br", "bw", "none"):
        assert filter_weights(REWARDS, torch.arange(8) // 2, strategy).tolist() == [0.5] * 8


def test_published_weights_of_five_responses() -> None:
    rewards, group = torch.tensor([0.0, 3.0, 1.0, 2.0, 3.0]), torch.zeros(5, dtype=torch.int64)
    assert filter_weights(rewards, group, "br").tolist() == [0.125, 0.125, 0.125, 0.125, 0.5]
    assert filter_weights(rewards, group, "bw").tolist() == [0.5, 0, 0, 0, 0.5]
    assert filter_weights(rewards, group, "bon").tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("strategy", RANKED)
def test_weights_sum_to_one_per_group_and_are_not_negative(strategy: Any) -> None:
    weights = filter_weights(REWARDS, GROUP, strategy)
    assert_close(Groups.of(GROUP).sum(weights), torch.ones(3, dtype=torch.float64))
    assert (weights >= 0).all()


@pytest.mark.parametrize("strategy", RANKED)
def test_increasing_transforms_of_the_reward_change_no_rank_weight(strategy: Any) -> None:
    weights = filter_weights(REWARDS, GROUP, strategy)
    for transformed in (REWARDS.exp(), REWARDS**3, 5 * REWARDS - 40):
        assert torch.equal(weights, filter_weights(transformed, GROUP, strategy))


@pytest.mark.parametrize(("strategy", "options"), [("pow", {}), ("top", {"high": 0.5})])
def test_increasing_transforms_do_change_powers_and_thresholds(strategy: Any, options: dict) -> None:
    weights = filter_weights(REWARDS, GROUP, strategy, **options)
    assert not torch.allclose(weights, filter_weights(REWARDS.exp(), GROUP, strategy, **options))


@pytest.mark.parametrize("strategy", RANKED)
def test_constant_added_to_a_prompts_rewards_changes_no_rank_weight(strategy: Any) -> None:
    shifted = REWARDS + torch.tensor([10.0, -3.0, 10.0, 4.0, 10.0, -3.0, 10.0, 10.0])
    assert torch.equal(filter_weights(REWARDS, GROUP, strategy), filter_weights(shifted, GROUP, strategy))


@pytest.mark.parametrize(("strategy", "skip_ties"), list(product((*RANKED, "pow"), (False, True))))
def test_expected_weight_of_resampling_is_the_weight(strategy: Any, skip_ties: bool) -> None:
    batch = outcome_batch(REWARDS, GROUP)
    options = {"strategy": strategy, "skip_ties": skip_ties}
    exact, draws = weigh(batch, **options), 40_000
    mean = weigh(batch, **options, mode="resample", draws=draws)
    # a share of `draws` has a standard deviation of at most 1 / (2 sqrt(draws)); in units of the loss: times 5 * 3
    assert (mean - exact).abs().max() < 15 * 5 / (2 * draws**0.5)


def test_resampling_draws_as_often_as_asked_from_samples_with_weight_alone() -> None:
    weights = filter_weights(REWARDS, GROUP, "bw")
    drawn = drawn_shares(weights, Groups.of(GROUP), 3, draw()) * 3
    assert torch.equal(drawn, drawn.round()) and not drawn[weights == 0].any()
    assert Groups.of(GROUP).sum(drawn).tolist() == [3, 3, 3]


def test_best_of_n_with_the_filtered_mean_as_baseline_teaches_nothing() -> None:
    for mode in ("weight", "resample"):
        method = polopt.Method(
            advantage=GroupCentred(),
            selection=PolicyFiltration(strategy="bon", mode=mode, draws=1),
            surrogate=PPOClip(),
        )
        batch = method.prepare(outcome_batch(REWARDS, GROUP), draw)
        assert len(batch) == 3 and not batch.advantages.any()


def test_whitening_before_the_filter_keeps_the_statistics_of_all_samples() -> None:
    batch = outcome_batch(REWARDS, GROUP)

    def advantages(whiten: Any) -> Tensor:
        filtration = PolicyFiltration(strategy="bon", whiten=whiten)
        method = polopt.Method(advantage=GroupCentred(), selection=filtration, surrogate=PPOClip())
        prepared = method.prepare(batch, draw)
        return prepared.advantages[prepared.weights > 0]

    assert not advantages("after").any() and advantages("before").any()


def test_r_squared_is_the_squared_correlation_between_0_and_1() -> None:
    rewards, scores = torch.randn(2, 50, generator=draw(), dtype=torch.float64)
    scores = scores + rewards
    found = r_squared(rewards, scores, torch.ones(50, dtype=torch.float64)).r2
    assert_close(found, torch.corrcoef(torch.stack([rewards, scores]))[0, 1].square())
    assert 0 < found < 1


@pytest.mark.parametrize("bins", [0, 4, 7])
def test_r_squared_ignores_affine_maps_of_rewards_and_scores(bins: int) -> None:
    rewards, scores = torch.randn(2, 50, generator=draw(), dtype=torch.float64)
    weights = filter_weights(rewards, torch.arange(50) // 5, "br")
    found = r_squared(rewards, scores, weights, bins).r2
    assert_close(found, r_squared(3 * rewards - 2, -0.5 * scores + 7, weights, bins).r2)
    assert 0 <= found <= 1


def test_two_bins_explain_everything_and_are_refused() -> None:
    values = torch.arange(6.0)
    for bins in (1, 2):
        with pytest.raises(PoloptError, match="at least 3"):
            r_squared(values, values, torch.ones(6), bins)


def test_r_squared_of_constant_rewards_is_zero_and_of_constant_scores_undefined() -> None:
    values, constant, weights = torch.arange(6.0), torch.ones(6), torch.ones(6)
    assert r_squared(constant, values, weights).r2 == 0
    assert r_squared(values, constant, weights).r2.isnan()


def test_power_zero_is_uniform_and_a_large_power_keeps_the_largest_reward_alone() -> None:
    batch = outcome_batch(REWARDS, torch.arange(8) // 4)
    assert_close(weigh(batch, strategy="pow", power=0.0), weigh(batch, strategy="none"))
    assert filter_weights(REWARDS, GROUP, "pow", power=2000.0).tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert filter_weights(torch.zeros(4), torch.arange(4), "pow").tolist() == [0.25] * 4


def test_skipped_ties_have_weight_zero() -> None:
    batch = outcome_batch(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1]))
    assert weigh(batch, strategy="bw", skip_ties=True).tolist() == [0, 0, 1, 1]
    assert weigh(batch, strategy="bw").tolist() == [1, 1, 1, 1]
