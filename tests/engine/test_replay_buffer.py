"""The replay buffer: a ring of the newest decisions, drawn uniformly, that continues from its state."""

import torch

from polopt.batch import Batch
from polopt.engine.replay_buffer import ReplayBuffer
from polopt.testing import random_batch
from polopt.testing.compare import same


def decisions(first: int, count: int) -> Batch:
    """Rows whose prompt ids are `first`, `first` + 1, ..."""
    whole = random_batch(seed=first, groups=(count, count), steps=6).decisions(frozenset())
    rows = whole[:count]
    rows.prompt_id = torch.arange(first, first + count)
    return rows


def drawn(buffer: ReplayBuffer, count: int, seed: int = 0) -> Batch:
    return buffer.draw(count, torch.Generator().manual_seed(seed))


def kept(buffer: ReplayBuffer) -> set[int]:
    return set(drawn(buffer, 4000).prompt_id.tolist())


def test_newest_decisions_are_kept_whole() -> None:
    buffer, added = ReplayBuffer(10), [decisions(0, 4), decisions(4, 4), decisions(8, 4)]
    for number, rows in enumerate(added):
        buffer.add(rows)
        assert buffer.seen == 4 * (number + 1)
        assert len(buffer) == min(buffer.seen, 10)
        assert kept(buffer) == set(range(max(0, buffer.seen - 10), buffer.seen))
    originals = {int(row.prompt_id): row for rows in added for row in rows.split(1)}
    for row in drawn(buffer, 50).split(1):
        same(row.to_tensors(), originals[int(row.prompt_id)].to_tensors())


def test_more_decisions_than_fit_leave_the_last_ones() -> None:
    buffer = ReplayBuffer(3)
    buffer.add(decisions(0, 5))
    assert kept(buffer) == {2, 3, 4}
    buffer.add(decisions(5, 1))
    assert kept(buffer) == {3, 4, 5}


def test_draws_are_uniform_with_replacement() -> None:
    buffer = ReplayBuffer(100)
    buffer.add(decisions(0, 8))
    counts = drawn(buffer, 16_000).prompt_id.bincount(minlength=8)
    assert bool(((counts - 2000).abs() < 6 * 2000**0.5).all())


def test_a_buffer_continues_from_its_state_whether_full_or_not() -> None:
    for capacity in (6, 50):
        buffer, copy = ReplayBuffer(capacity), ReplayBuffer(capacity)
        buffer.add(decisions(0, 4))
        buffer.add(decisions(4, 4))
        copy.load_state_dict(buffer.state_dict())
        for one in (buffer, copy):
            one.add(decisions(8, 3))
        same(drawn(copy, 40).to_tensors(), drawn(buffer, 40).to_tensors())


def test_an_empty_state_is_an_empty_buffer() -> None:
    buffer = ReplayBuffer(5)
    buffer.load_state_dict(ReplayBuffer(5).state_dict())
    assert len(buffer) == 0
