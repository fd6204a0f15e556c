"""Score statistics against counting everything."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polopt.language.scoring import (
    bootstrap_interval,
    majority_vote,
    normal_interval,
    pass_at_k,
    score_statistics,
    wilson_interval,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(
    samples: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(combinations(samples, k))
    expected = sum(map(any, subsets)) / len(subsets)
    found = pass_at_k(torch.tensor([len(samples)]), torch.tensor([sum(samples)]), k)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_prompts_and_samples() -> None:
    samples, correct = torch.tensor([10, 5000, 4, 7]), torch.tensor([3, 1, 0, 7])
    expected = [1 - math.comb(7, 4) / math.comb(10, 4), 4 / 5000, 0.0, 1.0]
    assert pass_at_k(samples, correct, 4).tolist() == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 1).shape == (0,)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(torch.tensor([4]), torch.tensor([1]), k)


@given(st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=1, max_size=10))
def test_majority_is_the_most_frequent_answer_with_ties_shared(samples: list[tuple[int, bool]]) -> None:
    votes = [answer for answer, _ in samples if answer >= 0]
    expected = 0.0
    if votes:
        top = max(map(votes.count, votes))
        winners = sorted({answer for answer in votes if votes.count(answer) == top})
        shares = [[right for answer, right in samples if answer == winner] for winner in winners]
        expected = sum(sum(share) / len(share) for share in shares) / len(shares)
    correct, answer = (
        torch.tensor([right for _, right in samples]),
        torch.tensor([answer for answer, _ in samples]),
    )
    assert majority_vote(correct, answer) == pytest.approx(expected)


@given(st.integers(1, 300), st.data())
def test_wilson_bounds_are_where_the_score_test_just_rejects(total: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, total))
    interval = wilson_interval(successes, total)
    assert 0 <= interval.low <= interval.estimate == successes / total <= interval.high <= 1
    for bound in interval[1:]:
        if 0 < bound < 1:
            z = abs(interval.estimate - bound) / math.sqrt(bound * (1 - bound) / total)
            assert z == pytest.approx(1.959964, abs=1e-5)


def test_normal_interval_by_hand() -> None:
    interval = normal_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert interval == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
    assert normal_interval(torch.tensor([1.0])) == (1.0, -math.inf, math.inf)


def test_bootstrap_agrees_with_all_resamples() -> None:
    values = torch.tensor([0.0, 1.0, 5.0])
    grid = torch.cartesian_prod(values, values, values).mean(-1).double().sort().values
    interval = bootstrap_interval(values, seeded(), resamples=100_000)
    assert interval.estimate == 2.0
    assert interval.low == pytest.approx(grid[0].item())
    assert interval.high == pytest.approx(grid[-1].item())
    wide = bootstrap_interval(values, seeded(), resamples=100_000, confidence=0.5)
    assert (wide.low, wide.high) == pytest.approx((1.0, 11 / 3 - 4 / 3 + 2 / 3), abs=0.7)


def test_bootstrap_draws_are_counted() -> None:
    values = torch.rand(50, generator=seeded())
    assert bootstrap_interval(values, seeded(3)) == bootstrap_interval(values, seeded(3))
    assert bootstrap_interval(values, seeded(3)) != bootstrap_interval(values, seeded(4))


@pytest.mark.parametrize("draw", ["normal", "bootstrap"])
def test_intervals_cover_the_mean_about_as_often_as_they_say(draw: str) -> None:
    generator, covered = seeded(), 0
    for _ in range(400):
        values = torch.rand(60, generator=generator)
        interval = normal_interval(values) if draw == "normal" else bootstrap_interval(values, generator, 200)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 400 <= 0.99


def test_no_values_have_no_interval() -> None:
    for interval in (normal_interval, lambda values: bootstrap_interval(values, seeded())):
        with pytest.raises(ValueError, match="at least one"):
            interval(torch.zeros(0))
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_statistics_of_single_samples() -> None:
    rewards = torch.tensor([[1.0, 0.5], [0.0, math.nan], [1.0, 1.5], [math.nan, 2.0]], dtype=torch.float64)
    found = score_statistics(rewards, torch.arange(4), torch.tensor([1, 2, 1, -1]), ("exact", "brevity"))
    assert set(found) == {
        f"{name}{end}" for name in ("score", "score/brevity") for end in ("", "/low", "/high")
    }
    assert (found["score"], found["score/low"], found["score/high"]) == pytest.approx(wilson_interval(2, 3))
    assert found["score/brevity"] == pytest.approx(4 / 3)
    assert found["score/brevity/low"] <= found["score/brevity"] <= found["score/brevity/high"]


def test_statistics_of_repeated_samples() -> None:
    correct = [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    answers = [[5, 5, 6, -1], [8, 8, 9, 7], [-1, -1, -1, -1]]
    order = torch.randperm(12, generator=seeded())
    rewards = torch.tensor(correct, dtype=torch.float64).reshape(12, 1)[order]
    group = torch.tensor([9, 4, 7]).repeat_interleave(4)[order]
    found = score_statistics(rewards, group, torch.tensor(answers).flatten()[order], ("exact",))
    assert found["score"] == pytest.approx(3 / 12)
    assert found["pass@2"] == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    assert found["pass@4"] == pytest.approx(2 / 3)
    assert found["majority"] == pytest.approx(1 / 3)
    assert "pass@8" not in found
    assert all(
        0 <= found[f"{name}/low"] <= found[name] <= found[f"{name}/high"] <= 1 for name in ("score", "pass@2")
    )
    assert found == score_statistics(rewards, group, torch.tensor(answers).flatten()[order], ("exact",))


def test_prompts_count_equally_however_many_samples_they_have() -> None:
    rewards = torch.tensor([[1.0]] * 9 + [[0.0]])
    found = score_statistics(
        rewards, torch.tensor([0] * 9 + [1]), torch.zeros(10, dtype=torch.int64), ("exact",)
    )
    assert found["score"] == 0.5


def test_graded_rewards_have_no_pass_at_k_and_nothing_measured_is_nan() -> None:
    group, answer = torch.tensor([0, 0]), torch.tensor([1, 1])
    graded = score_statistics(torch.tensor([[0.5], [1.0]]), group, answer, ("score",))
    assert set(graded) == {"score", "score/low", "score/high"}
    nothing = score_statistics(torch.full((2, 1), math.nan), group, answer, ("score",))
    assert set(nothing) == set(graded)
    assert all(map(math.isnan, nothing.values()))
    assert math.isnan(score_statistics(torch.zeros(0, 1), group[:0], answer[:0], ("score",))["score"])
