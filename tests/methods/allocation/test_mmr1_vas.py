"""Identities of the MMR1 / VAS card (arXiv 2509.21268)."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.testing import assert_close

from polopt.batch import Batch
from polopt.methods.allocation.mmr1_vas import (
    VarianceAware,
    bleu,
    distinct,
    diversity,
    edit_distance,
    edit_diversity,
    momentum_update,
    outcome_variance,
    sampling_weights,
    self_bleu,
)

CHAINS = st.lists(st.lists(st.integers(0, 4), max_size=8), min_size=1, max_size=5)
METRICS = ("self_bleu_123", "distinct_n", "edit")


def test_outcome_variance_is_symmetric_largest_at_one_half_and_zero_iff_all_agree() -> None:
    rate = torch.linspace(0, 1, 101, dtype=torch.float64)
    variance = outcome_variance(rate)
    assert_close(variance, outcome_variance(1 - rate))
    assert variance.argmax() == 50 and variance[50] == 0.25
    assert (variance == 0).nonzero()[:, 0].tolist() == [0, 100]


@pytest.mark.parametrize("rollouts", [1, 2, 8])
def test_plug_in_variance_is_biased_by_one_over_the_rollouts(rollouts: int) -> None:
    p = 0.3
    counts = torch.arange(rollouts + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(rollouts, torch.tensor(p, dtype=torch.float64))
    expected = (binomial.log_prob(counts).exp() * outcome_variance(counts / rollouts)).sum()
    assert float(expected) == pytest.approx(p * (1 - p) * (rollouts - 1) / rollouts)


def test_identical_chains_have_no_diversity() -> None:
    chains = [[1, 2, 3, 4, 5]] * 4
    assert self_bleu(chains) == 1
    assert diversity(chains, "self_bleu_123") == 0 and edit_diversity(chains) == 0


def test_chains_without_a_common_token_are_wholly_diverse() -> None:
    chains = [[0, 1, 2], [3, 4, 5, 6], [7]]
    assert self_bleu(chains) == 0
    assert diversity(chains, "self_bleu_123") == 1 and diversity(chains, "edit") == 1


@given(CHAINS)
def test_diversity_lies_between_0_and_1(chains: list[list[int]]) -> None:
    for metric in METRICS:
        assert -1e-12 <= diversity(chains, metric) <= 1


@given(CHAINS, st.permutations(range(5)))
def test_renaming_tokens_changes_no_metric(chains: list[list[int]], names: Sequence[int]) -> None:
    renamed = [[100 * names[token] for token in chain] for chain in chains]
    for metric in METRICS:
        assert diversity(chains, metric) == pytest.approx(diversity(renamed, metric), abs=1e-12)


@given(CHAINS, st.randoms(use_true_random=False))
def test_the_order_of_the_rollouts_changes_no_metric(chains: list[list[int]], random: Any) -> None:
    shuffled = random.sample(chains, len(chains))
    for metric in METRICS:
        assert diversity(chains, metric) == pytest.approx(diversity(shuffled, metric), abs=1e-12)


def test_metrics_by_hand() -> None:
    # 1-grams 2/3 (a twice at most once), 2-grams 1/2, 3-grams 0.1/1; as long as the reference
    assert bleu([1, 2, 9], [[1, 2, 3]]) == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))
    assert bleu([1, 2], [[1, 2, 3, 4]]) < bleu([1, 2, 3, 4], [[1, 2, 3, 4]]) == 1
    assert distinct([[1, 2, 3, 1, 2, 3], [1, 2, 3]]) == pytest.approx(3 / 5)
    assert edit_distance([1, 2, 3, 4], [2, 3, 5]) == 2


def test_min_max_weights_are_zero_at_the_smallest_and_just_below_one_at_the_largest() -> None:
    weights = sampling_weights(torch.tensor([0.1, 0.25, 0.2, 0.1], dtype=torch.float64))
    assert weights[0] == 0 and weights[3] == 0
    assert 1 - 1e-6 < weights[1] < 1


def test_momentum_of_one_freezes_and_of_zero_replaces() -> None:
    old, new = torch.rand(2, 5, dtype=torch.float64)
    assert torch.equal(momentum_update(old, new, 1.0), old)
    assert torch.equal(momentum_update(old, new, 0.0), new)


def fixed(name: Any = 0) -> torch.Generator:
    return torch.Generator().manual_seed(sum(str(name).encode()))


def test_lambda_zero_visits_every_prompt_once_per_pass() -> None:
    part = VarianceAware(ratio=0.0, update_every=100)
    drawn = torch.cat([part(12, 4, fixed, fixed) for _ in range(6)])
    assert drawn[:12].sort().values.tolist() == list(range(12))
    assert torch.equal(drawn[:12], drawn[12:])


def test_lambda_zero_skips_the_tail_of_a_pass() -> None:
    part = VarianceAware(ratio=0.0, update_every=100)
    drawn = [part(10, 4, fixed, fixed) for _ in range(3)]
    assert torch.equal(drawn[2], drawn[0]) and len(torch.cat(drawn[:2]).unique()) == 8


def test_refresh_moves_the_uniform_stream_to_where_the_batches_would_have_taken_it() -> None:
    part = VarianceAware(ratio=0.0, update_every=3)
    drawn = [part(10, 4, fixed, fixed) for _ in range(4)]
    permutation = torch.randperm(10, generator=fixed())
    assert torch.equal(drawn[3], permutation[3 * 4 % 10 :][:4])


def test_lambda_one_draws_prompts_in_proportion_to_their_weights_and_the_least_never() -> None:
    part = VarianceAware(ratio=1.0)
    part.weights = sampling_weights(torch.tensor([0.0, 0.1, 0.15, 0.2], dtype=torch.float64))
    drawn = torch.bincount(part(4, 50_000, fixed, fixed), minlength=4) / 50_000
    expected = part.weights / part.weights.sum()
    # five standard deviations of a share
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 50_000).sqrt()).all()
    assert drawn[0] == 0


def test_batch_is_split_and_interleaved() -> None:
    part = VarianceAware(ratio=0.5)
    part.weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    drawn = part(8, 7, fixed, fixed)
    permutation = torch.randperm(8, generator=fixed())
    assert drawn[0::2][:3].tolist() == [2, 2, 2]
    assert drawn[[1, 3, 5, 6]].tolist() == permutation[:4].tolist()


def test_law_of_total_variance_over_chains() -> None:
    draws = torch.Generator().manual_seed(0)
    chain = torch.rand(6, generator=draws, dtype=torch.float64).softmax(0)
    success = torch.rand(6, generator=draws, dtype=torch.float64)
    inside = (chain * success * (1 - success)).sum()
    between = (chain * success.square()).sum() - (chain * success).sum().square()
    assert_close(outcome_variance((chain @ success)[None])[0], inside + between)
    pairs = chain[:, None] * chain * (success[:, None] - success).square()
    assert_close(between, pairs.sum() / 2)


def scored(chains: list[list[list[int]]], right: list[list[float]]) -> Batch:
    """Scoring rollouts: for each prompt its chains and whether they are right."""
    flat = [chain for found in chains for chain in found]
    width = max(map(len, flat))
    tokens = torch.tensor([chain + [77] * (width - len(chain)) for chain in flat])
    mask = torch.arange(width) < torch.tensor([len(chain) for chain in flat])[:, None]
    prompt = torch.arange(len(chains)).repeat_interleave(torch.tensor([len(found) for found in chains]))
    rewards = torch.tensor([value for values in right for value in values], dtype=torch.float64)
    other = torch.rand(len(flat), 1, dtype=torch.float64)
    return Batch(
        mask=mask,
        old_logp=torch.zeros(mask.shape),
        rewards=torch.cat([rewards[:, None], other], 1),
        group=prompt,
        prompt_id=prompt,
        payload=TensorDict({"tokens": tokens}, [len(flat)]),
        batch_size=[len(flat)],
    )


def test_scores_use_chains_without_padding_and_correctness_alone() -> None:
    part = VarianceAware(alpha=0.8, beta=0.2, normalize="none")
    chains = [[[1, 2, 3]] * 2, [[1, 2, 3], [4]], [[1, 2, 3], [4, 5, 6]]]
    part.take_scores(scored(chains, [[1, 0], [1, 1], [1, 0]]))
    assert part.weights.tolist() == pytest.approx([0.2, 0.2, 0.4])


def test_identical_chains_score_below_diverse_ones_at_equal_pass_rate() -> None:
    part = VarianceAware()
    chains = [[[1, 2, 3, 4]] * 4, [[i, i + 1, i + 2, i + 3] for i in range(0, 16, 4)]] * 3
    part.take_scores(scored(chains, [[1, 0, 1, 0]] * 6))
    assert part.weights[0::2].tolist() == [0, 0, 0] and (part.weights[1::2] > 0.9).all()


def test_equal_scores_are_drawn_uniformly() -> None:
    part = VarianceAware(ratio=1.0)
    part.weights = sampling_weights(torch.full((4,), 0.1, dtype=torch.float64))
    assert torch.bincount(part(4, 4000, fixed, fixed), minlength=4).min() > 800


def test_refreshes_come_every_so_many_batches() -> None:
    part = VarianceAware(update_every=3, scoring_rollouts=2)
    asked = []
    for _ in range(7):
        asked.append(part.to_score(5, fixed) is not None)
        part(5, 2, fixed, fixed)
    assert asked == [True, False, False, True, False, False, True]


def test_a_bounded_pool_is_a_random_part_of_the_prompts_that_is_scored_and_drawn_from_alone() -> None:
    part = VarianceAware(pool=6, scoring_rollouts=2, ratio=0.5)
    asked = part.to_score(1000, fixed)
    assert asked is not None
    pool, rollouts = asked
    assert rollouts == 2 and len(pool.unique()) == 6 and pool.max() > 6
    part.weights = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    drawn = part(1000, 12, fixed, fixed)
    assert set(drawn[0::2].tolist()) == {int(pool[3])}
    assert sorted(drawn[1::2].tolist()) == pool.tolist()


def test_state_continues_the_stream() -> None:
    part, other = VarianceAware(ratio=0.5), VarianceAware(ratio=0.5)
    part.weights = torch.rand(9, dtype=torch.float64)
    part(9, 4, fixed, fixed)
    other.load_state_dict(part.state_dict())
    assert torch.equal(part(9, 4, fixed, fixed), other(9, 4, fixed, fixed))
