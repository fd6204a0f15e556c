"""Parameters sharded over the ranks by FSDP2."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import backward, evaluate_rows
from polopt.engine.ranks import Ranks
from polopt.engine.sharding import full, load_full_state
from tests.engine.test_gradient import OBJECTIVES, PATHS, N, T, assert_same, make_batch
from tests.engine.two_ranks.training import same_after_resume, same_training

ALONE = Ranks()
STEPS = 3


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
        tokens = torch.where(batch.mask, batch.payload["tokens"], 0)
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


def whole_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: full(p.grad) for name, p in module.named_parameters()}


def check_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    batch = make_batch()
    sharded, actor = make_sharded_actor(ranks)
    alone = CachedActor(4)
    assert all(isinstance(p, DTensor) for p in actor.module.parameters())
    local = sum(p.to_local().numel() for p in actor.module.parameters() if isinstance(p, DTensor))
    assert local < 0.7 * sum(p.numel() for p in alone.module.parameters())
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


def check_gradients_in_lower_precision(ranks: Ranks) -> None:
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


def check_run_and_its_state_are_those_of_one_process(ranks: Ranks) -> None:
    sharded, actor = make_sharded_actor(ranks)
    alone = CachedActor(4)
    optimizer, plain = adam(actor), adam(alone)
    found, expected = train(actor, optimizer, sharded), train(alone, plain, ALONE)
    assert all(norm > 0.5 for norm in expected)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 1e-9)
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
        assert_same({name: full(p.detach())}, {name: right.detach()}, 1e-9)
    model, state = sharded.full_state(actor.module, optimizer)
    if ranks.is_main:
        back = CachedActor(4)
        load_full_state(back.module, adam(back), model, state)
        assert all(torch.equal(t, model[name]) for name, t in back.module.state_dict().items())


def check_rollouts_need_no_other_rank(ranks: Ranks) -> None:
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


def check_training_is_that_of_one_process(ranks: Ranks) -> None:
    same_training(Ranks(ranks.rank, ranks.world, "fsdp2"))
    same_after_resume(Ranks(ranks.rank, ranks.world, "fsdp2"))
