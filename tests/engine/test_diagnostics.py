"""Diagnostics equal their definitions on numbers worked by hand."""

import math

import pytest
import torch

from polopt.batch import Batch, Evaluation
from polopt.engine import diagnostics
from polopt.methods.classics.ppo import PPOClip


def batch() -> Batch:
    return Batch(
        mask=torch.tensor([[True, True], [True, False]]),
        old_logp=torch.tensor([[-1.0, -1.0], [-1.0, math.nan]], dtype=torch.float64),
        rewards=torch.tensor([[1.0, math.nan], [0.0, 0.5]], dtype=torch.float64),
        group=torch.tensor([0, 0]),
        prompt_id=torch.tensor([7, 7]),
        truncated=torch.tensor([False, True]),
        batch_size=[2],
    )


def test_rollout_metrics_count_rewards_apart_and_together() -> None:
    metrics = diagnostics.describe_rollout(batch(), ("a", "b"))
    assert metrics["reward"] == 0.75
    assert (metrics["reward/a"], metrics["reward/b"]) == (0.5, 0.5)
    assert (metrics["length"], metrics["length/max"], metrics["length/truncated"]) == (1.5, 2.0, 0.5)
    assert metrics["reward/missing"] == 0.0


def test_update_metrics_are_those_of_the_ratios() -> None:
    rows = batch()
    rows.advantages = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    ratios = torch.tensor([[2.0, 1.0], [0.5, 9.9]], dtype=torch.float64)
    metrics = diagnostics.describe_update([Evaluation(ratios.log() - 1.0)], rows, PPOClip())
    assert metrics["ratio/mean"] == pytest.approx(3.5 / 3)
    assert metrics["ratio/max"] == pytest.approx(2.0)
    assert metrics["ess"] == pytest.approx(3.5**2 / (3 * 5.25))
    assert metrics["clipped"] == pytest.approx(1 / 3)
    expected = [math.exp(-x) - 1 + x for x in (math.log(2), 0.0, math.log(0.5))]
    assert metrics["kl/old"] == pytest.approx(sum(expected) / 3)


def test_zero_gradient_groups_are_those_without_weighted_advantage() -> None:
    rows = batch()
    rows.group = torch.tensor([0, 1])
    rows.advantages = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    rows.weights = torch.ones(2, 2, dtype=torch.float64)
    assert diagnostics.describe_advantages(rows)["groups/zero_gradient"] == 0.5


def test_average_takes_means_and_the_largest_of_maxima() -> None:
    assert diagnostics.average([{"a": 1.0, "x/max": 1.0}, {"a": 3.0, "x/max": 5.0}, {"b": 4.0}]) == {
        "a": 2.0, "x/max": 5.0, "b": 4.0,
    }  # fmt: skip
