"""Decision-space gradients equal plain full-batch autograd: any objective, any micro-batches, any path."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import Backward, backward, evaluate_rows
from polopt.engine.ranks import Ranks
from polopt.functional.divergence import kl_estimate
from polopt.functional.groups import Groups
from polopt.functional.ratio import clipped_surrogate, log_ratio, sequence_log_ratio

EXACT = 1e-10
GROUPS = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3]
N, T, VOCABULARY, WIDTH = len(GROUPS), 6, 5, 8


class TinyPolicy(nn.Module):
    """Logits and a value for each token, from an observation and the tokens before it."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY + 1, WIDTH)
        self.observe = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.critic = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor, observation: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.cat([torch.full_like(tokens[:, :1], VOCABULARY), tokens[:, :-1]], 1)
        hidden = self.embed(before) + self.observe(observation)
        for layer in self.layers:
            steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
            hidden = hidden + torch.tanh(layer(hidden.cumsum(1) / steps))
        return self.head(hidden).log_softmax(-1), self.critic(hidden)[..., 0]


class TinyActor:
    """Evaluates in the micro-batches it is told to, and says NaN of every decision outside the mask."""

    def __init__(self, partition: list[Tensor] | int = N, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.ModuleDict({"policy": TinyPolicy()}).to(dtype)
        self.partition = partition
        self.evaluations = 0

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        self.evaluations += 1
        assert batch.payload is not None
        mask = batch.mask
        tokens = torch.where(mask, batch.payload["tokens"], 0)
        observation = torch.where(mask[..., None], batch.payload["observation"], 0.0)
        logprobs, value = self.module["policy"](tokens, observation)
        found = {
            "logp": logprobs.gather(-1, tokens[..., None])[..., 0] * options.get("scale", 1.0),
            "entropy": -(logprobs.exp() * logprobs).sum(-1),
            "value": value,
        }
        nan = torch.tensor(torch.nan, dtype=value.dtype)
        return Evaluation(**{name: torch.where(mask, found[name], nan) for name in requires | {"logp"}})

    def micro_batches(self, batch: Batch) -> list[Tensor]:
        if isinstance(self.partition, int):
            return list(torch.arange(len(batch)).split(self.partition))
        return self.partition


def make_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Ragged groups, ragged trajectories, one of them without any decision, garbage outside the mask."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, T + 1, (N,), generator=g)
    lengths[5] = 0
    mask = torch.arange(T) < lengths[:, None]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def garbage(values: Tensor) -> Tensor:
        return torch.where(mask.view(N, T, *(1,) * (values.dim() - 2)), values, torch.nan)

    payload = {
        "tokens": torch.randint(0, VOCABULARY, (N, T), generator=g).where(mask, 10**6),
        "observation": garbage(draw(N, T, 3)),
    }
    return Batch(
        mask=mask,
        old_logp=garbage(-1.6 + 0.3 * draw(N, T)),
        ref_logp=garbage(-1.6 + 0.3 * draw(N, T)),
        old_entropy=garbage(draw(N, T).abs()),
        old_value=garbage(draw(N, T)),
        rewards=draw(N, 1),
        group=torch.tensor(GROUPS),
        prompt_id=torch.tensor(GROUPS) + 40,
        advantages=garbage(draw(N, T)),
        loss_weight=torch.where(mask, draw(N, T).abs() + 0.1, 0.0),
        signals=TensorDict({"returns": garbage(draw(N, T))}, [N]),
        payload=TensorDict(payload, [N]),
        batch_size=[N],
    )


def ppo_like(evaluation: Evaluation, batch: Batch) -> Tensor:
    """PPO clip + k3 to the reference - entropy bonus + value loss: a sum over decisions."""
    evaluation = evaluation.where(batch.mask)
    assert batch.ref_logp is not None and evaluation.entropy is not None and evaluation.value is not None
    ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
    loss = clipped_surrogate(ratio, torch.where(batch.mask, clean(batch.advantages), 0.0), 0.2, 0.2)
    loss = loss + 0.3 * kl_estimate(evaluation.logp, batch.ref_logp, batch.mask) - 0.1 * evaluation.entropy
    loss = loss + 0.5 * (evaluation.value - torch.where(batch.mask, batch.signal("returns"), 0.0)).square()
    return (clean(batch.loss_weight) * loss).sum()


def gspo_like(evaluation: Evaluation, batch: Batch) -> Tensor:
    """One ratio for each trajectory: a sum over trajectories."""
    evaluation = evaluation.where(batch.mask)
    ratio = sequence_log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
    advantages = torch.where(batch.mask, clean(batch.advantages), 0.0)
    loss = clipped_surrogate(ratio.expand_as(advantages), advantages, 0.3, 0.3)
    return (clean(batch.loss_weight) * loss).sum()


def classification(evaluation: Evaluation, batch: Batch) -> Tensor:
    """Log-sum-exp over each group: cross entropy of the trajectories' scores to softmax(rewards)."""
    evaluation = evaluation.where(batch.mask)
    groups, score, weight = Groups.of(batch.group), scores(evaluation, batch), row_weights(batch)

    def log_normaliser(values: Tensor) -> Tensor:
        top = groups.max(values.detach())
        return top + groups.sum(weight * (values - top[groups.index]).exp()).clamp(min=1e-30).log()

    target = (batch.rewards[:, 0] - groups.broadcast(log_normaliser(batch.rewards[:, 0]))).exp()
    loss = -weight * target * (score - groups.broadcast(log_normaliser(score)))
    return loss.sum() / len(groups.size)


def pairwise(evaluation: Evaluation, batch: Batch) -> Tensor:
    """Logistic loss on every pair of trajectories of a group, and a square on the entropies of the pair."""
    evaluation = evaluation.where(batch.mask)
    assert evaluation.entropy is not None
    weight = row_weights(batch)
    pair = (batch.group[:, None] == batch.group) * weight[:, None] * weight
    score, entropy = scores(evaluation, batch), evaluation.entropy.sum(-1)
    better = (batch.rewards - batch.rewards.T).sign()
    loss = nn.functional.softplus(-better * (score[:, None] - score)) + (entropy[:, None] - entropy).square()
    return (pair * loss).sum()


def batch_normalised(evaluation: Evaluation, batch: Batch) -> Tensor:
    """Divided by the standard deviation of the minibatch's ratios, cut at a quantile of them, whitened values."""
    evaluation = evaluation.where(batch.mask)
    assert evaluation.value is not None
    counted = batch.mask & (clean(batch.loss_weight) > 0)
    ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
    cut = torch.minimum(ratio, ratio[counted].quantile(0.7))
    loss = -clean(batch.loss_weight) * cut * torch.where(batch.mask, clean(batch.advantages), 0.0)
    spread = evaluation.value[counted].std()
    return loss.sum() / (ratio[counted].std() + 0.1) + (evaluation.value[counted].mean() / spread).square()


def scores(evaluation: Evaluation, batch: Batch) -> Tensor:
    return evaluation.logp.sum(-1) / batch.lengths.clamp(min=1)


def row_weights(batch: Batch) -> Tensor:
    return (clean(batch.loss_weight) > 0).any(-1).to(batch.old_logp.dtype)


def clean(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


OBJECTIVES: dict[str, tuple[Callable[[Evaluation, Batch], Tensor], frozenset[str], bool]] = {
    "ppo_like": (ppo_like, frozenset({"logp", "entropy", "value"}), True),
    "gspo_like": (gspo_like, frozenset({"logp"}), True),
    "classification": (classification, frozenset({"logp"}), False),
    "pairwise": (pairwise, frozenset({"logp", "entropy"}), False),
    "batch_normalised": (batch_normalised, frozenset({"logp", "value"}), False),
}
"""Objective, what it reads, and whether it is a sum over trajectories."""
PATHS = [
    (name, path)
    for name, (_, _, separable) in OBJECTIVES.items()
    for path in (["fused"] if separable else []) + ["two passes", "skipped first pass"]
]
every_path = pytest.mark.parametrize(("name", "path"), PATHS)


def full_batch(
    name: str, actor: TinyActor, batch: Batch
) -> tuple[Tensor, Evaluation, dict[str, Tensor | None]]:
    """Loss, evaluation and gradients by autograd through everything at once."""
    objective, requires, _ = OBJECTIVES[name]
    actor.module.zero_grad()
    evaluation = actor.evaluate(batch, requires)
    loss = objective(evaluation, batch)
    loss.backward()
    return loss.detach(), evaluation.detach(), gradients(actor)


def in_decision_space(
    name: str,
    path: str,
    actor: TinyActor,
    batch: Batch,
    ranks: Ranks | None = None,
    rows: Tensor | None = None,
) -> Backward:
    """The same by the engine; the gradients lie in the actor."""
    objective, requires, _ = OBJECTIVES[name]
    current = None
    if path == "skipped first pass":
        with torch.no_grad():
            current = actor.evaluate(batch if rows is None else batch[rows], requires)
    actor.module.zero_grad()
    actor.evaluations = 0
    separable = path == "fused"
    return backward(
        actor, batch, objective, requires, separable=separable, current=current, ranks=ranks, rows=rows
    )


def gradients(actor: TinyActor) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in actor.module.named_parameters()}


def assert_same(
    found: Mapping[Any, Tensor | None], expected: Mapping[Any, Tensor | None], tolerance: float = EXACT
) -> None:
    """Each tensor differs by less than `tolerance` of its norm; those that are zero are zero."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        value = found[name]
        assert (value is None) == (right is None), name
        if value is not None and right is not None:
            assert value.isfinite().all(), name
            assert (value - right).norm() <= tolerance * right.norm(), name


def assert_equal_evaluations(found: Evaluation, expected: Evaluation, mask: Tensor) -> None:
    assert found.tensors().keys() == expected.tensors().keys()
    zeroed = found.where(mask).tensors()
    assert_same(zeroed, expected.where(mask).tensors())


@every_path
def test_gradient_is_that_of_full_batch_autograd_for_every_micro_batch_size(name: str, path: str) -> None:
    batch, actor = make_batch(), TinyActor()
    loss, evaluation, expected = full_batch(name, actor, batch)
    assert all(g is None or g.norm() > 0 for g in expected.values())
    for size in range(1, N + 1):
        actor.partition = size
        found = in_decision_space(name, path, actor, batch)
        assert abs(found.loss - loss) <= EXACT * abs(loss)
        assert_equal_evaluations(found.evaluation, evaluation, batch.mask)
        assert_same(gradients(actor), expected)


@st.composite
def partitions(draw: st.DrawFn) -> list[Tensor]:
    """All rows in any order, cut anywhere."""
    order = draw(st.permutations(range(N)))
    cuts = sorted(draw(st.sets(st.integers(1, N - 1))))
    return [torch.tensor(order[a:b]) for a, b in zip([0, *cuts], [*cuts, N], strict=True)]


@every_path
@settings(max_examples=15)
@given(partition=partitions())
def test_gradient_does_not_depend_on_the_partition(name: str, path: str, partition: list[Tensor]) -> None:
    batch, actor = make_batch(), TinyActor()
    loss, evaluation, expected = full_batch(name, actor, batch)
    actor.partition = partition
    found = in_decision_space(name, path, actor, batch)
    assert abs(found.loss - loss) <= EXACT * abs(loss)
    assert_equal_evaluations(found.evaluation, evaluation, batch.mask)
    assert_same(gradients(actor), expected)


@every_path
def test_float32_gradients_agree_to_a_millionth(name: str, path: str) -> None:
    batch, actor = make_batch(torch.float32), TinyActor(dtype=torch.float32)
    _, _, expected = full_batch(name, actor, batch)
    actor.partition = 3
    in_decision_space(name, path, actor, batch)
    assert_same(gradients(actor), expected, 2e-6)


@pytest.mark.parametrize("name", [name for name, (_, _, separable) in OBJECTIVES.items() if not separable])
def test_coupled_objectives_really_couple_micro_batches(name: str) -> None:
    batch, actor = make_batch(), TinyActor()
    _, _, expected = full_batch(name, actor, batch)
    actor.partition = 2
    in_decision_space(name, "fused", actor, batch)
    worst = max(
        float((g - e).norm() / e.norm())
        for g, e in zip(gradients(actor).values(), expected.values(), strict=True)
        if g is not None and e is not None
    )
    assert not worst < 0.01


@every_path
def test_rows_left_out_are_rows_of_weight_zero(name: str, path: str) -> None:
    batch, actor = make_batch(), TinyActor()
    rows = torch.tensor([8, 0, 2, 4, 9, 6])
    chosen = torch.zeros(N, 1, dtype=torch.bool)
    chosen[rows] = True
    batch.loss_weight = torch.where(chosen, clean(batch.loss_weight), 0.0)
    loss, evaluation, expected = full_batch(name, actor, batch)
    actor.partition = 4
    found = in_decision_space(name, path, actor, batch, rows=rows)
    assert abs(found.loss - loss) <= EXACT * abs(loss)
    assert_equal_evaluations(found.evaluation, evaluation.map(lambda t: t[rows]), batch.mask[rows])
    assert_same(gradients(actor), expected)


def test_rows_left_out_keep_what_the_behaviour_policy_said() -> None:
    batch, actor = make_batch(), TinyActor()
    batch.set_signal("old_score_sqnorm", torch.arange(N * T).view(N, T).double())
    seen: list[Evaluation] = []

    def objective(evaluation: Evaluation, batch: Batch) -> Tensor:
        seen.append(evaluation)
        return evaluation.where(batch.mask).logp.sum()

    rows = torch.tensor([3, 1])
    known = Evaluation(torch.zeros(2, T), entropy=torch.ones(2, T), score_sqnorm=torch.full((2, T), 7.0))
    actor.partition = 1
    backward(
        actor, batch, objective, frozenset({"logp", "entropy"}), separable=False, rows=rows, current=known
    )
    others = torch.tensor([i for i in range(N) if i not in (1, 3)])
    for field in ("logp", "entropy"):
        old = getattr(batch, f"old_{field}")[others]
        assert torch.equal(getattr(seen[0], field)[others].nan_to_num(), old.nan_to_num().float())
    assert seen[0].score_sqnorm is not None
    assert torch.equal(seen[0].score_sqnorm[others], batch.signal("old_score_sqnorm")[others].float())
    assert torch.equal(seen[0].score_sqnorm[rows], torch.full((2, T), 7.0))


@every_path
def test_garbage_outside_the_mask_changes_nothing(name: str, path: str) -> None:
    dirty, actor = make_batch(), TinyActor(4)

    def tidied(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != (N, T) or tensor.dtype == torch.bool:
            return tensor
        return torch.where(dirty.mask.view(N, T, *(1,) * (tensor.dim() - 2)), tensor, 0)

    tidy = dirty.apply(tidied)
    assert clean(tidy.advantages).isfinite().all()
    found = in_decision_space(name, path, actor, dirty)
    expected = gradients(actor)
    again = in_decision_space(name, path, actor, tidy)
    assert torch.equal(found.loss, again.loss)
    for grad, other in zip(expected.values(), gradients(actor).values(), strict=True):
        assert grad is None or (other is not None and torch.equal(grad, other))


def test_each_path_evaluates_only_as_often_as_it_must() -> None:
    batch, actor = make_batch(), TinyActor(3)
    pieces = len(actor.micro_batches(batch))
    for path, passes in [("fused", 1), ("two passes", 2), ("skipped first pass", 1)]:
        in_decision_space("ppo_like", path, actor, batch)
        assert actor.evaluations == passes * pieces, path


def test_gradients_are_added_to_those_that_are_there() -> None:
    batch, actor = make_batch(), TinyActor(4)
    objective, requires, _ = OBJECTIVES["pairwise"]
    in_decision_space("pairwise", "two passes", actor, batch)
    once = gradients(actor)
    backward(actor, batch, objective, requires, separable=False)
    assert_same(gradients(actor), {name: None if g is None else 2 * g for name, g in once.items()})


def test_gradients_are_taken_where_gradients_are_switched_off() -> None:
    batch, actor = make_batch(), TinyActor(4)
    _, _, expected = full_batch("pairwise", actor, batch)
    with torch.no_grad():
        in_decision_space("pairwise", "two passes", actor, batch)
    assert_same(gradients(actor), expected)


def test_fields_that_nobody_differentiates_get_no_gradient() -> None:
    batch, actor = make_batch(), TinyActor(4)
    found = in_decision_space("gspo_like", "two passes", actor, batch)
    fields = found.evaluation.tensors()
    assert fields.keys() == {"logp"}
    assert actor.module.get_parameter("policy.critic.weight").grad is None
    assert not found.loss.requires_grad
    assert not fields["logp"].requires_grad


def test_constant_objective_has_zero_gradient() -> None:
    batch, actor = make_batch(), TinyActor(4)
    for separable in (True, False):
        actor.module.zero_grad()
        backward(actor, batch, lambda e, b: b.rewards.sum(), frozenset({"logp"}), separable=separable)
        assert all(not p.grad.any() for p in actor.module.parameters() if p.grad is not None)


def test_options_reach_the_actor() -> None:
    batch, actor = make_batch(), TinyActor(4)
    rows = torch.arange(N)
    plain = evaluate_rows(actor, batch, rows, frozenset({"logp"}), {}, Ranks())
    scaled = evaluate_rows(actor, batch, rows, frozenset({"logp"}), {"scale": 2.0}, Ranks())
    assert torch.equal(scaled.logp.nan_to_num(), 2 * plain.logp.nan_to_num())


def test_evaluation_of_rows_comes_in_their_order_and_without_gradient() -> None:
    batch, actor = make_batch(), TinyActor(2)
    rows = torch.tensor([7, 2, 9, 0, 1])
    found = evaluate_rows(actor, batch, rows, frozenset({"logp", "value"}), {}, Ranks())
    expected = actor.evaluate(batch, frozenset({"logp", "value"})).detach().map(lambda t: t[rows])
    assert_equal_evaluations(found, replace(expected), batch.mask[rows])
    assert not found.logp.requires_grad


def test_evaluation_of_no_rows_is_empty() -> None:
    batch, actor = make_batch(), TinyActor()
    for rows, some in [(torch.arange(0), batch), (torch.arange(0), batch[:0])]:
        found = evaluate_rows(actor, some, rows, frozenset({"value"}), {}, Ranks())
        assert {name: t.shape for name, t in found.tensors().items()} == {"logp": (0, T), "value": (0, T)}


def test_no_rows_have_no_gradient_to_give() -> None:
    batch, actor = make_batch(), TinyActor()
    for separable in (True, False):
        with pytest.raises(ValueError, match="none to evaluate"):
            backward(actor, batch, gspo_like, frozenset({"logp"}), separable=separable, rows=torch.arange(0))
