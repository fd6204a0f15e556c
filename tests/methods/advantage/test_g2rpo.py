"""Identities of the G2RPO card (arXiv 2604.08539)."""

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.groups import Groups
from polopt.methods.advantage.g2rpo import (
    AccuracyFilter,
    GaussianRank,
    LengthEnvelope,
    TaskEntropyBand,
    entropy_band,
    gaussian_rank_advantage,
    length_envelope,
    normal_scores,
    task_entropy,
)

GROUP = torch.arange(40) // 4
TASK = (GROUP >= 4).long()
KNOTS = (10.0, 20.0, 50.0, 90.0)


def rewards(seed: int = 0, columns: int = 1) -> torch.Tensor:
    return torch.randn(40, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_group(values: torch.Tensor) -> torch.Tensor:
    return normal_scores(values, Groups.of(torch.zeros(len(values), dtype=torch.int64)))


def quantiles(n: int) -> torch.Tensor:
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 0, 0, 1], [-0.32] * 4 + [1.28]),
        ([0.1, 0.1, 0.1, 0.2, 1], [-0.60] * 3 + [0.52, 1.28]),
        ([0, 0, 1, 1, 1], [-0.90] * 2 + [0.60] * 3),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.90] * 2 + [0.26] * 2 + [1.28]),
    ],
)
def test_normal_scores_of_the_worked_examples(values: list[float], expected: list[float]) -> None:
    found = one_group(torch.tensor(values, dtype=torch.float64))
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=0.0051, rtol=0.0)


def test_g2rpo_is_invariant_to_increasing_transforms_of_each_prompts_rewards() -> None:
    values = rewards()
    scale = (1 + GROUP[:, None]).double()
    found = gaussian_rank_advantage((values / scale).exp() * scale - scale, GROUP, TASK)
    assert_close(found, gaussian_rank_advantage(values, GROUP, TASK), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("digits", [0, 1, 12])
def test_g2rpo_sums_to_zero_in_every_task(digits: int) -> None:
    _, advantage = gaussian_rank_advantage(rewards().round(decimals=digits), GROUP, TASK)
    assert_close(Groups.of(TASK).sum(advantage), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_normal_scores_without_ties_are_the_quantiles_whatever_the_rewards() -> None:
    heavy, dense = rewards(1)[:, 0] ** 7 * 1e3, 0.8 + 1e-3 * rewards(2)[:, 0]
    for values in (heavy, dense):
        assert_close(one_group(values).sort().values, quantiles(40))


def test_g2rpo_gives_tasks_of_equal_size_equal_norms_whatever_the_rewards() -> None:
    half = (GROUP >= 5).long()
    _, advantage = gaussian_rank_advantage(
        torch.where(half[:, None] > 0, rewards(1) ** 7, 0.8 + rewards(2) / 1e3), GROUP, half
    )
    assert_close(advantage[half == 0].sort().values, advantage[half == 1].sort().values)


@pytest.mark.parametrize("digits", [0, 12])
def test_g2rpo_of_negated_rewards_is_negated(digits: int) -> None:
    values = rewards(columns=2).round(decimals=digits)
    _, advantage = gaussian_rank_advantage(values, GROUP, TASK)
    assert_close(gaussian_rank_advantage(-values, GROUP, TASK)[1], -advantage, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("n", "bound"), [(8, 1.534), (256, 2.886)])
def test_normal_scores_are_bounded_by_the_batch_size(n: int, bound: float) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    values[0] = 1e6
    assert one_group(values).abs().max().item() == pytest.approx(bound, abs=5e-4)
    assert one_group(values.round()).abs().max() < bound + 5e-4


@pytest.mark.parametrize("digits", [0, 12])
def test_g2rpo_second_stage_changes_nothing_for_a_task_of_one_prompt(digits: int) -> None:
    values, alone = rewards().round(decimals=digits), torch.zeros(40, dtype=torch.int64)
    first, advantage = gaussian_rank_advantage(values, alone, alone)
    assert_close(advantage, first)
    assert_close(one_group(one_group(first)), first)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_normal_scores_of_a_binary_prompt_are_the_tied_means(k: int) -> None:
    phi = quantiles(8)[8 - k :].sum()
    found = one_group((torch.arange(8) >= 8 - k).double())
    assert_close(found, torch.cat([(-phi / (8 - k)).expand(8 - k), (phi / k).expand(k)]))
    assert found.norm() < quantiles(8).norm()


def test_several_rewards_add_their_group_scores_before_the_task_stage() -> None:
    values = rewards(columns=3)
    each = [normal_scores(column, Groups.of(GROUP)) for column in values.unbind(-1)]
    first, advantage = gaussian_rank_advantage(values, GROUP, TASK)
    assert_close(first, torch.stack(each).sum(0))
    assert_close(advantage, normal_scores(torch.stack(each).sum(0), Groups.of(TASK)))


def test_envelope_is_a_continuous_trapezoid_with_its_peak_on_the_plateau_alone() -> None:
    length = torch.linspace(0, 100, 10_001, dtype=torch.float64)
    height = length_envelope(length, *KNOTS)
    assert ((height >= 0) & (height <= 1)).all()
    assert torch.equal(height == 1, (length >= 20) & (length <= 50))
    assert height.diff().abs().max() <= 0.01 / 10 + 1e-9
    at = length_envelope(torch.tensor([10.0, 15, 70, 90, 91]), *KNOTS)
    assert_close(at, torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0]))


def test_envelope_with_empty_ramps_is_a_step() -> None:
    length = torch.tensor([9.0, 10, 20, 21])
    assert length_envelope(length, 10, 10, 20, 20).tolist() == [0, 1, 1, 0]
    assert length_envelope(length, 10, 10, 10, 10).tolist() == [0, 1, 0, 0]


def a_batch(
    values: torch.Tensor, group: torch.Tensor = GROUP, task: torch.Tensor = TASK, width: int = 6
) -> Batch:
    n = len(group)
    mask = torch.arange(width) < 1 + torch.arange(n)[:, None] % width
    return Batch(
        mask=mask, old_logp=torch.zeros(n, width, dtype=torch.float64), rewards=values, group=group, prompt_id=group,
        task=task, loss_weight=mask.double(), batch_size=[n],
    )  # fmt: skip


def band_gradient(level: list[float], **options: object) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Penalty and its gradient on what is measured, for the mean entropies of the two tasks."""
    batch = a_batch(rewards())
    entropy = torch.tensor(level, dtype=torch.float64)[TASK][:, None].expand(batch.mask.shape)
    entropy = torch.where(batch.mask, entropy, torch.nan).requires_grad_()
    part = TaskEntropyBand(**options)
    loss = part(Evaluation(logp=-entropy, entropy=entropy), batch)
    return loss.detach(), torch.autograd.grad(loss, entropy)[0], batch


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_entropy_band_is_zero_without_gradient_inside(estimator: str) -> None:
    loss, gradient, _ = band_gradient([0.25, 0.55], estimator=estimator)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_entropy_band_gradient_outside_is_the_coefficient_over_the_tasks_decisions(estimator: str) -> None:
    loss, gradient, batch = band_gradient([0.1, 0.9], estimator=estimator, coef=0.05)
    assert loss.item() == pytest.approx(0.05 * (0.1 + 0.3))
    decisions = torch.stack([batch.mask[task == TASK].sum() for task in (0, 1)])[TASK]
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64)[TASK]
    assert_close(gradient, torch.where(batch.mask, (0.05 * sign / decisions)[:, None], 0.0))


def test_entropy_band_skips_tasks_without_decisions() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    entropy = torch.tensor([[0.3, 0.5], [9.0, 9.0]], dtype=torch.float64)
    found = task_entropy(entropy, mask, torch.tensor([3, 7]))
    assert_close(found, torch.tensor([0.4], dtype=torch.float64))
    assert entropy_band(found, 0.2, 0.6) == 0
    assert entropy_band(task_entropy(entropy, torch.zeros_like(mask), torch.tensor([3, 7])), 0.2, 0.6) == 0


@pytest.mark.parametrize("size", [8, 16, 24])
def test_constant_groups_score_exactly_zero_and_are_not_ranked_by_rounding(size: int) -> None:
    values = torch.cat([torch.full((8,), 0.1), torch.full((size,), 0.7), torch.tensor([0.0, 1.0])]).double()
    group = torch.cat([torch.zeros(8), torch.ones(size), torch.full((2,), 2)]).long()
    first, advantage = gaussian_rank_advantage(values[:, None], group, torch.zeros_like(group))
    assert not first[:-2].any() and not advantage[:-2].any()
    assert advantage[-1] > 1 and advantage[-1].item() == pytest.approx(-advantage[-2].item())


def test_single_samples_single_task_rows_and_missing_rewards_are_defined() -> None:
    first, advantage = gaussian_rank_advantage(
        torch.tensor([[5.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1])
    )
    assert first[0] == 0 and advantage[0] == 0
    values = rewards(columns=2)
    values[:20, 1] = torch.nan
    found, _ = gaussian_rank_advantage(values, GROUP, TASK)
    alone, _ = gaussian_rank_advantage(values[:, :1], GROUP, TASK)
    assert found.isfinite().all()
    assert_close(found[:20], alone[:20])
    empty = torch.zeros(0, dtype=torch.int64)
    assert GaussianRank()(a_batch(torch.zeros(0, 2), empty, empty)).shape == (0, 1)


def test_g2rpo_does_not_depend_on_the_order_of_rows() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    values = rewards(columns=2).round(decimals=0)
    expected = GaussianRank()(a_batch(values))
    assert_close(GaussianRank()(a_batch(values[order], 90 - GROUP[order], 7 - TASK[order])), expected[order])


def test_length_envelope_adds_its_weighted_reward_as_a_column() -> None:
    batch = a_batch(rewards())
    shaped = LengthEnvelope(min_start=1, peak_start=3, peak_end=4, max_end=6, weight=0.1)(
        batch, lambda _: torch.Generator()
    )
    assert torch.equal(shaped.rewards[:, :1], batch.rewards) and batch.rewards.shape == (40, 1)
    height = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.5, 0.0], dtype=torch.float64)[torch.arange(40) % 6]
    assert_close(shaped.rewards[:, 1], 0.1 * height)
    with pytest.raises(ConfigError, match="peak_start"):
        LengthEnvelope(min_start=1, peak_start=6, peak_end=4, max_end=6)


def test_accuracy_filter_keeps_the_prompts_that_are_neither_solved_nor_hopeless() -> None:
    values = (torch.arange(40) % 4 < (GROUP % 5)[:, None].T).double().T
    kept = AccuracyFilter().accepts(a_batch(values))
    assert torch.equal(kept, ~torch.isin(GROUP % 5, torch.tensor([0, 4])))
    assert AccuracyFilter().max_rounds == 20


def test_accuracy_is_the_first_reward_alone() -> None:
    accuracy = (torch.arange(40) % 4 < (GROUP % 5)).double()
    kept = AccuracyFilter().accepts(a_batch(torch.stack([accuracy, torch.ones_like(accuracy)], 1)))
    assert torch.equal(kept, ~torch.isin(GROUP % 5, torch.tensor([0, 4])))


def test_accuracy_of_a_group_is_over_the_rewards_that_are_known() -> None:
    accuracy = torch.tensor([1.0, torch.nan, 1.0, 0.0, torch.nan, torch.nan], dtype=torch.float64)
    batch = a_batch(accuracy[:, None], torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(6, dtype=torch.int64))
    assert AccuracyFilter().accepts(batch).tolist() == [False, False, True, True, False, False]
