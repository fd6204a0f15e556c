"""What test_ranks.py runs in two processes at once: the functions named `replicated_...` or `sharded_...`.

    torchrun --nproc-per-node 2 tests/engine/distributed_worker.py replicated

Each process runs the same checks in the same order and says `passed NAME` after each. Runs are written to the working
directory.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from test_gradient import (
    GROUPS,
    OBJECTIVES,
    PATHS,
    N,
    T,
    TinyActor,
    assert_same,
    gradients,
    in_decision_space,
    make_batch,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polopt.batch import Batch, Evaluation, concatenate
from polopt.engine.gradient import backward, evaluate_rows
from polopt.engine.ranks import Ranks
from polopt.engine.sharding import load_full_state
from polopt.errors import ConfigError, PoloptError
from polopt.functional.ratio import log_ratio
from polopt.method import Method, Surrogate
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import ppo
from polopt.miniature import SumModActor, SumModTask
from polopt.trainer import Trainer, TrainerConfig

ALONE = Ranks()
STEPS = 3


def replicated_start(ranks: Ranks) -> None:
    assert ranks.world == 2 and ranks.rank == dist.get_rank() and ranks.is_main == (ranks.rank == 0)
    assert ranks.describe() == "2 processes (gloo), each with all parameters"
    assert Ranks.start(expected=2).world == 2
    with pytest.raises(ConfigError, match="ranks = 3: this run has 2 processes"):
        Ranks.start(expected=3)


def replicated_sum(ranks: Ranks) -> None:
    one = ranks.rank + 1
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32):
        mine = torch.full((2, 3), one, dtype=dtype)
        total = ranks.sum(mine.T)
        assert total.dtype == dtype and total.tolist() == [[3, 3]] * 3 and mine.eq(one).all()
    assert ranks.sum(torch.tensor([True, ranks.is_main, False])).tolist() == [True, True, False]
    assert ranks.sum(torch.tensor(0.1, dtype=torch.float64)).item() == 0.2


def replicated_gradients_of_two_ranks_are_those_of_one(ranks: Ranks) -> None:
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


def replicated_rows_left_out_on_two_ranks(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor(2)
    for rows in (torch.tensor([8, 0, 2, 4, 9]), torch.tensor([6])):  # one row: the other rank has no work
        for name, path in PATHS:
            if path == "fused" or len(rows) > 1:
                expected = in_decision_space(name, path, actor, batch, rows=rows)
                alone = gradients(actor)
                found = in_decision_space(name, path, actor, batch, ranks, rows=rows)
                assert_same(gradients(actor), alone)
                assert_same({"loss": found.loss}, {"loss": expected.loss})


def replicated_work_is_shared(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor(N)
    in_decision_space("gspo_like", "fused", actor, batch, ranks)
    assert actor.evaluations == 1
    lengths = torch.zeros(1, dtype=torch.float64)
    lengths += sum(
        int(batch.lengths[piece.rows].sum())
        for piece in ranks.share(actor.micro_batches(batch), batch.lengths)
    )
    assert lengths.item() < batch.lengths.sum() and ranks.sum(lengths).item() == batch.lengths.sum()


def replicated_evaluation_is_the_same_bit_for_bit(ranks: Ranks) -> None:
    batch, actor = make_batch(), TinyActor(1)
    requires, rows = frozenset({"logp", "entropy", "value"}), torch.tensor([9, 3, 4])
    found = evaluate_rows(actor, batch, rows, requires, {}, ranks).where(batch.mask[rows])
    expected = evaluate_rows(actor, batch, rows, requires, {}, ALONE).where(batch.mask[rows])
    assert all(torch.equal(t, expected.tensors()[name]) for name, t in found.tensors().items())


def replicated_gradient_sums(ranks: Ranks) -> None:
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


def replicated_same_parameters_at_the_start(ranks: Ranks) -> None:
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


def replicated_gather_is_concatenation(ranks: Ranks) -> None:
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


def replicated_gather_equals_concatenate_for_equal_widths(ranks: Ranks) -> None:
    whole = make_batch()
    parts = [whole[:3], whole[3:]]
    found = ranks.gather(parts[ranks.rank])
    expected = concatenate(parts)
    fields: dict[str, Any] = dict(expected.to_tensordict().flatten_keys("/").items())
    assert fields.keys() == set(found.to_tensordict().flatten_keys("/").keys())
    for key, tensor in found.to_tensordict().flatten_keys("/").items():
        torch.testing.assert_close(tensor, fields[key], rtol=0, atol=0, equal_nan=True)
    assert torch.unique(found.group).numel() == len(set(GROUPS))


def replicated_gather_of_nothing(ranks: Ranks) -> None:
    found = ranks.gather(rollouts(0)[:0] if ranks.is_main else rollouts(1))
    assert len(found) == 5 and torch.equal(found.old_logp, rollouts(1).old_logp)
    assert found.group.tolist() == [0, 0, 1, 1, 2]
    assert len(ranks.gather(rollouts(0)[:0])) == 0


def replicated_gather_refuses_different_fields(ranks: Ranks) -> None:
    mine = rollouts(0)
    if ranks.is_main:
        mine.terminated = None
    with pytest.raises(PoloptError, match="differ"):
        ranks.gather(mine)


class Layer(nn.Module):
    """Attention to what a cache holds, as a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.key(hidden))
        keys = torch.cat(cache, 1)
        seen = keys.shape[1] - hidden.shape[1] + torch.arange(1, hidden.shape[1] + 1)
        future = torch.arange(keys.shape[1]) >= seen[:, None]
        attention = (self.query(hidden) @ keys.mT).masked_fill(future, -1e9).softmax(-1)
        return hidden + torch.tanh(self.out(attention @ keys))


class CachedPolicy(nn.Module):
    """A transformer with a tied head that reads the prompt once and its completions from its cache."""

    def __init__(self, vocabulary: int = 7, width: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def hidden(self, tokens: Tensor, caches: list[list[Tensor]]) -> Tensor:
        hidden = self.embed(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, cache)
        return self.norm(hidden)


class CachedActor:
    """Evaluates completions of a shared prompt, with a critic beside the policy."""

    def __init__(self, partition: int, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            policy, critic = CachedPolicy(), nn.Linear(6, 1)
            policy.norm.bias.requires_grad_(False)
        self.module = nn.ModuleDict({"policy": policy, "critic": critic}).to(dtype)
        self.partition = partition

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        policy: Any = self.module["policy"]
        tokens = torch.where(batch.mask, batch.payload["tokens"], 0)  # type: ignore[index]
        caches: list[list[Tensor]] = [[] for _ in policy.layers]
        prompt = policy.hidden(torch.tensor([[1, 2, 3]]), caches)
        caches = [[c.expand(len(batch), -1, -1) for c in cache] for cache in caches]
        rest = policy.hidden(tokens[:, :-1], caches)
        hidden = torch.cat([prompt[:, -1:].expand(len(batch), -1, -1), rest], 1)
        logprobs = nn.functional.linear(hidden, policy.head.weight).log_softmax(-1)
        logp = logprobs.gather(-1, tokens[..., None])[..., 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        found = {"logp": logp, "entropy": entropy, "value": self.module["critic"](hidden)[..., 0]}
        return Evaluation(**{name: found[name] for name in requires | {"logp"}})

    def micro_batches(self, batch: Batch) -> list[Tensor]:
        return list(torch.arange(len(batch)).split(self.partition))


def make_sharded_actor(
    ranks: Ranks, partition: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Ranks, CachedActor]:
    actor = CachedActor(partition, dtype)
    sharded = Ranks(ranks.rank, ranks.world, "fsdp2")
    assert "each with all parameters" in sharded.describe()
    sharded.shard(actor.module)
    assert sharded.describe() == "2 processes (gloo), parameters sharded over them by fsdp2"
    return sharded, actor


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: whole(p.grad) for name, p in module.named_parameters()}


def sharded_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    batch = make_batch()
    sharded, actor = make_sharded_actor(ranks)
    alone = CachedActor(4)
    assert all(isinstance(p, DTensor) for p in actor.module.parameters())
    assert sum(p.to_local().numel() for p in actor.module.parameters()) < sum(  # type: ignore[attr-defined]
        p.numel() for p in alone.module.parameters()
    )
    for name, path in PATHS:
        if path == "skipped first pass":
            continue
        objective, requires, _ = OBJECTIVES[name]
        for size in (2, N):
            for some, own in ((actor, sharded), (alone, ALONE)):
                some.partition = size
                some.module.zero_grad()
                backward(some, batch, objective, requires, separable=path == "fused", ranks=own)
            assert_same(whole_gradients(actor.module), whole_gradients(alone.module))


def sharded_gradients_in_lower_precision(ranks: Ranks) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 0.1)):
        batch = make_batch(dtype)
        sharded, actor = make_sharded_actor(ranks, dtype=dtype)
        alone = CachedActor(4, dtype)
        objective, requires, _ = OBJECTIVES["gspo_like"]
        for some, own in ((actor, sharded), (alone, ALONE)):
            backward(some, batch, objective, requires, separable=True, ranks=own)
        found, expected = whole_gradients(actor.module), whole_gradients(alone.module)
        assert_same(found, expected, tolerance)


def train(
    actor: CachedActor, optimizer: torch.optim.Optimizer, ranks: Ranks, steps: int = STEPS
) -> list[Tensor]:
    """A few clipped steps; returns the gradient norms."""
    batch = make_batch()
    objective, requires, _ = OBJECTIVES["pairwise"]
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        backward(actor, batch, objective, requires, separable=False, ranks=ranks)
        norms.append(ranks.clip_gradients(list(actor.module.parameters()), 0.5))
        optimizer.step()
    return norms


def adam(actor: CachedActor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in actor.module.parameters() if p.requires_grad], lr=0.05)


def sharded_run_and_its_state_are_those_of_one_process(ranks: Ranks) -> None:
    sharded, actor = make_sharded_actor(ranks)
    alone = CachedActor(4)
    optimizer, plain = adam(actor), adam(alone)
    found, expected = train(actor, optimizer, sharded), train(alone, plain, ALONE)
    assert all(norm > 0.5 for norm in expected)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 1e-9)  # type: ignore[arg-type]
    model, state = sharded.full_state(actor.module, optimizer)
    right_model, right_state = ALONE.full_state(alone.module, plain)
    if not ranks.is_main:
        assert model == {} and state == {}
    else:
        assert_same(dict(model), dict(right_model), 1e-9)
        assert [g | {"params": 0} for g in state["param_groups"]] == [
            g | {"params": 0} for g in right_state["param_groups"]
        ]
        assert state["param_groups"][0]["params"] == right_state["param_groups"][0]["params"]
        assert state["state"].keys() == right_state["state"].keys()
        for name, values in right_state["state"].items():
            assert not any(isinstance(v, DTensor) for v in state["state"][name].values())
            assert_same(state["state"][name], values, 1e-8)
    continues_from(ranks, alone, plain, right_model, right_state)


def continues_from(
    ranks: Ranks,
    alone: CachedActor,
    plain: torch.optim.Optimizer,
    model: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """A sharded run continues from the state of a run of one process."""
    model, state = copy.deepcopy(model), copy.deepcopy(state)
    sharded, actor = make_sharded_actor(ranks)
    optimizer = adam(actor)
    sharded.load_full_state(actor.module, optimizer, model, state)
    moment = next(iter(optimizer.state.values()))["exp_avg"]
    assert isinstance(moment, DTensor)
    train(actor, optimizer, sharded, 2)
    train(alone, plain, ALONE, 2)
    for (name, p), right in zip(actor.module.named_parameters(), alone.module.parameters(), strict=True):
        assert_same({name: whole(p.detach())}, {name: right.detach()}, 1e-9)
    model, state = sharded.full_state(actor.module, optimizer)
    if ranks.is_main:
        back = CachedActor(4)
        load_full_state(back.module, adam(back), model, state)
        assert all(torch.equal(t, model[name]) for name, t in back.module.state_dict().items())


def sharded_rollouts_need_no_other_rank(ranks: Ranks) -> None:
    batch = make_batch()
    sharded, actor = make_sharded_actor(ranks)
    alone, requires = CachedActor(4), frozenset({"logp", "value"})
    optimizer, plain = adam(actor), adam(alone)
    for _ in range(2):
        with sharded.full_parameters(), torch.no_grad():
            for step in range(1 + 3 * ranks.rank):  # as often as this rank likes
                rows = batch[step : step + 2]
                found, expected = actor.evaluate(rows, requires), alone.evaluate(rows, requires)
                assert_same(dict(found.tensors()), dict(expected.tensors()), 1e-9)
            assert not any(isinstance(p, DTensor) for p in actor.module.parameters())
        assert all(isinstance(p, DTensor) for p in actor.module.parameters())
        train(actor, optimizer, sharded, 1)
        train(alone, plain, ALONE, 1)
    rows = torch.arange(N)
    found = evaluate_rows(actor, batch, rows, requires, {}, sharded)
    assert_same(
        dict(found.tensors()), dict(evaluate_rows(alone, batch, rows, requires, {}, ALONE).tensors()), 1e-9
    )
    assert found.logp.shape == (N, T)


class Spread(Surrogate):
    """A policy gradient divided by the spread of the minibatch's ratios."""

    coupling = "batch"

    def forward(self, evaluation: Evaluation, batch: Batch) -> Tensor:
        assert batch.loss_weight is not None and batch.advantages is not None
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return -(batch.loss_weight * batch.advantages * ratio).sum() / (1 + ratio[batch.mask].std())


def trainer(ranks: Ranks, coupled: bool, out: Path | None = None, iterations: int = 4) -> Trainer:
    task: Any = SumModTask()
    actor: Any = SumModActor(task, rows=4)
    method = Method(advantage=GroupStandardized(), surrogate=Spread()) if coupled else ppo()
    sizes: dict[str, Any] = {"prompts": 5, "rollouts": 3, "epochs": 2, "minibatches": 2}
    config = TrainerConfig(iterations=iterations, lr=0.01, **sizes)
    return Trainer(actor, task, method, config, out=out, ranks=ranks)


def numbers(metrics: dict[str, float]) -> dict[str, Tensor | None]:
    kept = {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in kept.items()}


def same_training(ranks: Ranks) -> None:
    """Iterations and scores of a trainer on `ranks` are those of a trainer alone."""
    for coupled in (True, False):
        run, alone = trainer(ranks, coupled), trainer(ALONE, coupled)
        for _ in range(3):
            assert_same(numbers(run.iterate()[0]), numbers(alone.iterate()[0]), 1e-8)
        found, expected = run.score(), alone.score()
        assert {**found, "samples": 0} == {**expected, "samples": 0}
        model = run.state_dict()["model"]
        if ranks.is_main:
            assert_same(model, dict(alone.actor.module.state_dict()), 1e-8)


def same_after_resume(ranks: Ranks) -> None:
    """A run that stops after two iterations and goes on is bit for bit the one that did not stop."""
    name = ranks.sharding
    whole = trainer(ranks, True, Path(name, "whole"))
    whole.run()
    trainer(ranks, True, Path(name, "stopped"), iterations=2).run()
    ranks.barrier()
    resumed = trainer(ranks, True, Path(name, "stopped"))
    resumed.run(resume=True)
    first, second = whole.state_dict(), resumed.state_dict()
    assert first["iteration"] == second["iteration"] == 4
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    ranks.barrier()


def replicated_training_is_that_of_one_process(ranks: Ranks) -> None:
    same_training(ranks)
    same_after_resume(ranks)


def sharded_training_is_that_of_one_process(ranks: Ranks) -> None:
    same_training(Ranks(ranks.rank, ranks.world, "fsdp2"))
    same_after_resume(Ranks(ranks.rank, ranks.world, "fsdp2"))


def main(kind: str) -> None:
    ranks = Ranks.start(expected=2)
    checks = {name: check for name, check in globals().items() if name.startswith(f"{kind}_")}
    for name, check in checks.items():
        check(ranks)
        ranks.barrier()
        sys.stdout.write(f"passed {name}\n")
        sys.stdout.flush()
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1])
