"""Learning rates and the guard against numbers that are not finite."""

import pytest
import torch

from polopt.engine.optimization import DivergedError, FiniteGuard, learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert [learning_rate(1.0, "constant", 4, i, 10) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_fall_from_the_peak_towards_zero(schedule: str) -> None:
    rates = [learning_rate(1.0, schedule, 0, i, 10) for i in range(11)]  # type: ignore[arg-type]
    assert rates[0] == 1.0 and rates[10] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_guard_counts_skips_and_gives_up_after_patience() -> None:
    guard = FiniteGuard(patience=2)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    assert guard.accepts(good, good)
    assert not guard.accepts(bad, good)
    assert not guard.accepts(good, torch.tensor(float("inf")))
    assert guard.accepts(good, good)
    assert (guard.skipped, guard.in_a_row) == (2, 0)
    for _ in range(2):
        assert not guard.accepts(bad, bad)
    with pytest.raises(DivergedError, match="3 updates in a row"):
        guard.accepts(bad, bad)
