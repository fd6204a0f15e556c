"""Minibatches are a partition of the rows, and keep groups whole when asked."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from polopt.engine.minibatches import minibatches
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
