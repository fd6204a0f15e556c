"""Parameters whole on every rank."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn

from polopt.batch import ABSENT, Batch, concatenate
from polopt.engine.gradient import evaluate_rows
from polopt.engine.ranks import Ranks
from polopt.errors import ConfigError, PoloptError
from tests.engine.test_gradient import (
    GROUPS,
    PATHS,
    N,
    TinyActor,
    assert_same,
    gradients,
    in_decision_space,
    make_batch,
)
from tests.engine.two_ranks.training import same_after_resume, same_training

ALONE = Ranks()


def check_start(ranks: Ranks) -> None:
    assert ranks.world == 2 and ranks.rank == dist.get_rank() and ranks.is_main == (ranks.rank == 0)
    assert ranks.describe() == "2 processes (gloo), each with all parameters"
    assert Ranks.start(expected=2).world == 2
    with pytest.raises(ConfigError, match="ranks = 3: this run has 2 processes"):
        Ranks.start(expected=3)


def check_sum(ranks: Ranks) -> None:
    one = ranks.rank + 1
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32):
        mine = torch.full((2, 3), one, dtype=dtype)
        total = ranks.sum(mine.T)
        assert total.dtype == dtype and total.tolist() == [[3, 3]] * 3 and mine.eq(one).all()
    assert ranks.sum(torch.tensor([True, ranks.is_main, False])).tolist() == [True, True, False]
    assert ranks.sum(torch.tensor(0.1, dtype=torch.float64)).item() == 0.2


def check_gradients_of_two_ranks_are_those_of_one(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor()
    for name, path in PATHS:
        for size in (1, 2, 4, N):  # 11, 6, 3 and 1 micro-batches
            actor.partition = size
            expected = in_decision_space(name, path, actor, batch)
            alone = gradients(actor)
            found = in_decision_space(name, path, actor, batch, ranks)
            assert_same(gradients(actor), alone)
            assert_same({"loss": found.loss}, {"loss": expected.loss})
            mask = batch.mask
            assert_same(
                dict(found.evaluation.where(mask).tensors()), dict(expected.evaluation.where(mask).tensors())
            )


def check_rows_left_out_on_two_ranks(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor(2)
    for rows in (torch.tensor([8, 0, 2, 4, 9]), torch.tensor([6])):  # one row: the other rank has no work
        for name, path in PATHS:
            if path == "fused" or len(rows) > 1:
                expected = in_decision_space(name, path, actor, batch, rows=rows)
                alone = gradients(actor)
                found = in_decision_space(name, path, actor, batch, ranks, rows=rows)
                assert_same(gradients(actor), alone)
                assert_same({"loss": found.loss}, {"loss": expected.loss})


def check_work_is_shared(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor(N)
    in_decision_space("gspo_like", "fused", actor, batch, ranks)
    assert actor.evaluations == 1
    lengths = torch.zeros(1, dtype=torch.float64)
    lengths += sum(
        int(batch.lengths[piece.rows].sum())
        for piece in ranks.share(actor.micro_batches(batch), batch.lengths)
    )
    assert lengths.item() < batch.lengths.sum() and ranks.sum(lengths).item() == batch.lengths.sum()


def check_evaluation_is_the_same_bit_for_bit(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor(1)
    requires, rows = frozenset({"logp", "entropy", "value"}), torch.tensor([9, 3, 4])
    found = evaluate_rows(actor, batch, rows, requires, {}, ranks).where(batch.mask[rows])
    expected = evaluate_rows(actor, batch, rows, requires, {}, ALONE).where(batch.mask[rows])
    assert all(torch.equal(t, expected.tensors()[name]) for name, t in found.tensors().items())


def check_gradient_sums(ranks: Ranks) -> None:
    module = nn.ParameterDict(
        {
            "both": torch.zeros(3),
            "main": torch.zeros(2, 2),
            "none": torch.zeros(1),
            "low": torch.zeros(4, dtype=torch.bfloat16),
            "earlier": torch.zeros(2),
        }
    )
    module["frozen"] = nn.Parameter(torch.zeros(1), requires_grad=False)
    module["earlier"].grad = torch.full((2,), 10.0)
    with ranks.sum_gradients(module):
        (module["both"].sum() * (1 + ranks.rank)).backward()
        (module["low"].sum() * 3 + module["earlier"].sum()).backward()
        if ranks.is_main:
            (module["main"].sum() * 5).backward()
    assert module["both"].grad.tolist() == [3.0] * 3
    assert module["main"].grad.tolist() == [[5.0] * 2] * 2
    assert module["none"].grad is None and module["frozen"].grad is None
    assert module["low"].grad.dtype == torch.bfloat16 and module["low"].grad.tolist() == [6.0] * 4
    assert module["earlier"].grad.tolist() == [12.0] * 2
    with ranks.sum_gradients(module):
        pass
    assert module["both"].grad.tolist() == [3.0] * 3 and module["none"].grad is None


def check_same_parameters_at_the_start(ranks: Ranks) -> None:
    torch.manual_seed(ranks.rank)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module.get_buffer("1.running_mean").add_(ranks.rank)
    expected = copy.deepcopy(module).state_dict()
    ranks.shard(module)
    same = all(torch.equal(t, expected[name]) for name, t in module.state_dict().items())
    assert same == ranks.is_main
    total = {name: ranks.sum(t.double()) for name, t in module.state_dict().items()}
    assert all(torch.equal(total[name], 2 * t.double()) for name, t in module.state_dict().items())


def rollouts(rank: int) -> Batch:
    """Three trajectories on rank 0, five longer ones on rank 1."""
    rows, length, width = [(3, 4, 7), (5, 6, 3)][rank]
    g = torch.Generator().manual_seed(rank)
    batch = Batch(
        mask=torch.rand(rows, length, generator=g) < 0.7,
        old_logp=torch.randn(rows, length, generator=g),
        rewards=torch.randn(rows, 4, generator=g),
        group=torch.arange(rows) // 2,
        prompt_id=torch.arange(rows) + 100 * rank,
        terminated=torch.rand(rows, generator=g) < 0.5,
        turn=torch.arange(length).expand(rows, -1),
        payload=TensorDict(
            {
                "prompt": torch.randint(0, 9, (rows, width), generator=g),
                "nested": {"image": torch.randn(rows, width, 2, dtype=torch.float64, generator=g)},
            },
            [rows],
        ),
        batch_size=[rows],
    )
    batch.set_signal("ess", torch.randn(rows, generator=g))
    return batch


def check_gather_is_concatenation(ranks: Ranks) -> None:
    found = ranks.gather(rollouts(ranks.rank))
    short, long = rollouts(0), rollouts(1)

    def padded(tensor: Tensor, *sizes: int) -> Tensor:
        whole = tensor.new_zeros(len(tensor), *sizes)
        whole[tuple(slice(size) for size in tensor.shape)] = tensor
        return whole

    for name in ("mask", "old_logp", "turn"):
        expected = torch.cat([padded(getattr(short, name), 6), getattr(long, name)])
        assert torch.equal(getattr(found, name), expected) and getattr(found, name).dtype == expected.dtype
    for name in ("rewards", "prompt_id", "terminated"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(short, name), getattr(long, name)]))
    assert found.group.tolist() == [0, 0, 1, 2, 2, 3, 3, 4]
    assert torch.equal(found.signal("ess"), torch.cat([short.signal("ess"), long.signal("ess")]))
    assert found.payload is not None and short.payload is not None and long.payload is not None
    for key, sizes in [("prompt", (7,)), (("nested", "image"), (7, 2))]:
        expected = torch.cat([padded(short.payload[key], *sizes), padded(long.payload[key], *sizes)])
        assert torch.equal(found.payload[key], expected)
    assert found.ref_logp is None and type(found) is Batch and found.batch_size == (8,)


def check_gather_equals_concatenate_for_equal_widths(ranks: Ranks) -> None:
    whole = make_batch()
    parts = [whole[:3], whole[3:]]
    found = ranks.gather(parts[ranks.rank])
    expected = concatenate(parts)
    fields: dict[str, Any] = dict(expected.to_tensordict().flatten_keys("/").items())
    assert fields.keys() == set(found.to_tensordict().flatten_keys("/").keys())
    for key, tensor in found.to_tensordict().flatten_keys("/").items():
        torch.testing.assert_close(tensor, fields[key], rtol=0, atol=0, equal_nan=True)
    assert torch.unique(found.group).numel() == len(set(GROUPS))


def check_gather_of_nothing(ranks: Ranks) -> None:
    found = ranks.gather(rollouts(0)[:0] if ranks.is_main else rollouts(1))
    assert len(found) == 5 and torch.equal(found.old_logp, rollouts(1).old_logp)
    assert found.group.tolist() == [0, 0, 1, 1, 2]
    assert len(ranks.gather(rollouts(0)[:0])) == 0


def check_gather_refuses_different_fields(ranks: Ranks) -> None:
    mine = rollouts(0)
    if ranks.is_main:
        mine.turn = ABSENT
    with pytest.raises(PoloptError, match="differ"):
        ranks.gather(mine)


def check_training_is_that_of_one_process(ranks: Ranks) -> None:
    same_training(ranks)
    same_after_resume(ranks)
