"""Minibatches are a partition of the rows, and keep groups whole when asked."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.engine.minibatches import minibatches, usual_rows
from polopt.engine.seeding import generator


@given(groups=st.lists(st.integers(0, 9), max_size=40), count=st.integers(1, 12), keep=st.booleans())
def test_minibatches_are_a_partition_of_the_rows(groups: list[int], count: int, keep: bool) -> None:
    group = torch.tensor(groups, dtype=torch.int64)
    pieces = list(minibatches(group, count, keep, generator(0, "test", 0)))
    assert sorted(torch.cat(pieces).tolist() if pieces else []) == list(range(len(group)))
    assert len(pieces) <= count
    if keep:
        for piece in pieces:
            others = torch.ones(len(group), dtype=torch.bool).index_fill(0, piece, False)
            assert not set(group[piece].tolist()) & set(group[others].tolist())


def test_minibatches_have_nearly_equal_size_and_random_order() -> None:
    group = torch.arange(64) // 8
    first = list(minibatches(group, 4, True, generator(0, "test", 0)))
    second = list(minibatches(group, 4, True, generator(0, "test", 1)))
    assert [len(p) for p in first] == [16] * 4
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_minibatch_is_the_batch_in_order() -> None:
    (rows,) = minibatches(torch.tensor([3, 1, 3]), 1, False, generator(0, "test", 0))
    assert rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "control", "rows"),
    [
        ("ppo", {"horizon": 20}, 3 * 20 // 4),  # decisions
        ("ppo", {"horizon": 21}, None),  # decisions that are not to be shared out evenly
        ("ppo", {"horizon": 0}, None),  # decisions of episodes, whose lengths are not known
        ("gspo", {"horizon": 20}, None),  # trajectories
        ("mdpo-off", {"horizon": 20}, 32),  # from the replay buffer
    ],
    ids=["decisions", "uneven", "episodes", "trajectories", "replayed"],
)
def test_the_usual_rows_are_those_of_the_minibatches(
    method: str, control: dict[str, Any], rows: int | None
) -> None:
    sizes = {"prompts": 3, "rollouts": 1, "batch_size": 32, "learning_starts": 0}
    sizes["minibatches"] = {"gspo": 3, "mdpo-off": 1}.get(method, 4)
    run: Any = build(
        RunConfig.create(
            "", domain="control", method=method, task="Pendulum-v1", trainer=sizes, control=control
        )
    )
    found = usual_rows(run.actor, run.method, run.config)
    seen: list[int] = []
    take = run.stepper.take
    run.stepper.take = lambda batch, *given: seen.append(len(batch)) or take(batch, *given)
    run.iterate()
    assert found == rows
    if rows is not None:
        assert set(seen) == {rows}
    close(run)
