"""How a method is put together: what it needs and gives, the order of its parts, what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polopt
from polopt.batch import Batch, Evaluation
from polopt.engine.seeding import generator
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.methods.classics.entropy import EntropyBonus
from polopt.methods.classics.kl import KLPenalty, KLReward
from polopt.methods.classics.ppo import GAE, PPOClip, ValueLoss
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.parts import (
    SLOTS,
    Advantage,
    AdvantageTransform,
    Budget,
    Draw,
    Optimizer,
    Regularizer,
    Sampler,
    Selection,
    Shaping,
    Surrogate,
)
from polopt.testing import random_batch
from polopt.testing.subject import Subject, draws, prepared


class Outcome(Advantage):
    """The reward itself."""

    def forward(self, batch: Batch) -> Tensor:
        return batch.outcome()[:, None]


class Doubled(AdvantageTransform):
    """Twice the advantage before."""

    def forward(self, batch: Batch, advantages: Tensor) -> Tensor:
        return 2 * advantages


class PlusOne(AdvantageTransform):
    """One more than the advantage before."""

    def forward(self, batch: Batch, advantages: Tensor) -> Tensor:
        return advantages + 1


class Squared(Shaping):
    """The square of the rewards."""

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        batch = batch.clone(recurse=False)
        batch.rewards = batch.rewards.square()
        return batch


class PositiveOnly(Selection):
    """Keeps positive advantages."""

    def forward(self, batch: Batch, draw: Draw) -> Tensor:
        return (batch.advantages > 0).double()


class Rewarded(Selection):
    """Keeps rewarded trajectories, before advantages are taken."""

    before_advantage = True

    def forward(self, batch: Batch, draw: Draw) -> Tensor:
        assert batch.advantages is None
        return (batch.outcome() > 0)[:, None].double()


class Gives(Advantage):
    """Gives a signal."""

    provides = frozenset({"quality"})

    def forward(self, batch: Batch) -> Tensor:
        return batch.outcome()[:, None]

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        return {"quality": batch.outcome() + batch.advantages.sum(-1)}


class Takes(PPOClip):
    """Reads that signal."""

    requires = frozenset({"quality"})


def method(**slots: Any) -> Method:
    return Method(**{"advantage": Outcome(), "surrogate": ScoreFunction()} | slots)


def row_values(values: Tensor, batch: Batch) -> list[float]:
    """The common value of each trajectory's decisions, in the order of rows, of those that have any."""
    rows = batch.mask.any(-1)
    return [float(v[m][0]) for v, m in zip(values[rows], batch.mask[rows], strict=True)]


def test_empty_slots_have_the_classic_filling() -> None:
    made = method()
    assert [type(part) for part in made.parts] == [
        Sampler,
        Budget,
        Outcome,
        Selection,
        ScoreFunction,
        Optimizer,
    ]
    batch = made.prepare(random_batch(), draws(0))
    assert torch.equal(batch.weights, batch.mask.double())


def test_shaping_comes_first_and_transforms_apply_in_their_order() -> None:
    batch = random_batch(rewards="graded")
    squares = batch.rewards[:, 0].square()
    both = method(shaping=[Squared(), Squared()], advantage=[Outcome(), Doubled(), PlusOne()])
    found = both.prepare(batch, draws(0))
    assert row_values(found.advantages, batch) == pytest.approx(
        (2 * squares.square() + 1)[batch.mask.any(-1)].tolist()
    )
    other = method(advantage=[Outcome(), PlusOne(), Doubled()]).prepare(batch, draws(0))
    assert row_values(other.advantages, batch) == pytest.approx(
        (2 * batch.rewards[:, 0] + 2)[batch.mask.any(-1)].tolist()
    )


def test_selection_after_the_advantage_leaves_advantages_as_they_are() -> None:
    batch = random_batch()
    plain, chosen = (method(**s).prepare(batch, draws(0)) for s in ({}, {"selection": PositiveOnly()}))
    assert torch.equal(plain.advantages, chosen.advantages)
    assert torch.equal(chosen.weights, (plain.advantages > 0).double())
    assert len(chosen) == len(batch)


def test_selection_before_the_advantage_hides_what_it_drops() -> None:
    batch = random_batch()
    found = polopt.recipe("rloo").with_parts(selection=Rewarded()).prepare(batch, draws(0))
    kept = (batch.rewards[:, 0] > 0) & batch.mask.any(-1)
    assert found.payload["row"].tolist() == kept.nonzero()[:, 0].tolist()
    assert not found.advantages.any()


def test_trajectories_without_any_reward_are_dropped() -> None:
    batch = random_batch(columns=2)
    batch.rewards[0], batch.rewards[1, 0], batch.rewards[2] = (
        torch.nan,
        torch.nan,
        torch.tensor([torch.inf, -torch.inf]),
    )
    found = method().prepare(batch, draws(0))
    assert set(range(len(batch))) - set(found.payload["row"].tolist()) == {0, 2}
    batch.step_rewards = torch.ones_like(batch.old_logp)
    rest = set(range(len(batch))) - set(method().prepare(batch, draws(0)).payload["row"].tolist())
    assert rest == {row for row in (0, 2) if not batch.mask[row].any()}


def test_rewards_that_the_loss_cannot_hold_count_as_missing() -> None:
    batch = random_batch()
    batch.old_logp, batch.rewards[3] = batch.old_logp.float(), 1e300
    found = method().prepare(batch, draws(0))
    assert 3 not in found.payload["row"]
    assert found.advantages.isfinite().all()


def test_prepared_fields_are_zero_outside_the_mask_and_the_payload_is_untouched() -> None:
    batch = random_batch(frozenset({"ref_logp", "old_value"}))
    assert batch.old_logp.isnan().any()
    payload = torch.full_like(batch.old_logp, 7.0)
    batch.payload["same_shape_as_the_mask"] = payload
    found = method().prepare(batch, draws(0))
    for name in ("old_logp", "ref_logp", "old_value", "advantages", "weights"):
        assert not getattr(found, name)[~found.mask].any(), name
    assert torch.equal(found.payload["same_shape_as_the_mask"], payload)


def test_a_reward_for_each_decision_position_is_no_mask() -> None:
    batch = random_batch(columns=6)
    assert batch.rewards.shape == batch.mask.shape
    assert torch.equal(method().prepare(batch, draws(0)).rewards, batch.rewards)


def test_signals_see_advantages_and_have_the_precision_of_the_batch() -> None:
    batch = random_batch()
    batch.old_logp = batch.old_logp.float()
    made = Method(advantage=Gives(), surrogate=Takes())
    found = made.prepare(batch, draws(0))
    assert found.signal("quality").dtype == torch.float32
    assert_close(found.signal("quality"), (found.outcome() + found.advantages.sum(-1)).float())
    assert made.requires == frozenset()
    assert made.provides == {"quality"}


def test_requirements_and_evaluations_are_those_of_all_parts() -> None:
    regularizers = [KLPenalty(), EntropyBonus(), ValueLoss()]
    made = Method(advantage=GAE(), surrogate=PPOClip(), regularizers=regularizers, shaping=[KLReward()])
    assert made.requires == {"ref_logp", "entropy", "value", "old_value"}
    assert made.evaluated == {"logp", "entropy", "value"}


def test_separable_is_what_all_losses_are() -> None:
    class Coupled(Regularizer):
        separable = False

        def forward(self, evaluation: Evaluation, batch: Batch) -> Tensor:
            return evaluation.logp.std()

    class Grouped(ScoreFunction):
        coupling = "group"

    assert method().separable
    assert not method(regularizers=[Coupled()]).separable
    assert not method(surrogate=Grouped()).separable


def test_objective_is_surrogate_and_regularizers_together() -> None:
    batch = random_batch(frozenset({"ref_logp"}))
    made = method(regularizers=[KLPenalty(coef=0.3), EntropyBonus(coef=0.2)])
    subject = Subject(made)
    batch = prepared(made, batch)
    evaluation = subject.evaluate(made, batch).where(batch.mask)
    total = made.objective(evaluation, batch)
    assert_close(
        total,
        sum(
            (part(evaluation, batch) for part in (made.surrogate, *made.regularizers)), torch.zeros(())
        ).double(),
    )
    kl = KLPenalty(coef=0.3)
    penalty = 0.3 * (batch.loss_weight * kl.decision_penalty(evaluation, batch)).sum()
    assert_close(kl(evaluation, batch), penalty)


def test_parts_can_be_replaced_and_the_name_says_so() -> None:
    grpo = polopt.recipe("grpo")
    other = grpo.with_parts(surrogate=ScoreFunction(), regularizers=[EntropyBonus()])
    assert other.name == "grpo+surrogate=reinforce+regularizers=entropy"
    assert other.advantage[0] is grpo.advantage[0]
    assert other.slot("regularizers")[0].name == "entropy"
    assert grpo.slot("regularizers") == []
    assert polopt.recipe("ppo").with_parts(surrogate=PPOClip()).defaults == {"epochs": 4, "minibatches": 4}


def test_state_of_a_method_is_the_state_of_its_parts() -> None:
    made = polopt.recipe("reinforce", advantage="reinforce:baseline=moving_average")
    assert {"sampler.drawn", "advantage.0.average", "advantage.0.iterations"} == set(made.state_dict())


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"surrogate": Outcome()}, "surrogate: Outcome is no Surrogate part"),
        ({"advantage": PPOClip()}, "advantage: PPOClip is no Advantage part"),
        ({"regularizers": [Squared()]}, "regularizers: Squared is no Regularizer part"),
        ({"advantage": []}, "advantage: the slot is empty; name an estimator"),
        ({"advantage": [Doubled()]}, "changes another advantage; name an estimator before it"),
        ({"advantage": [Outcome(), Outcome()]}, "is an estimator of its own; a method has one"),
        ({"surrogate": Takes()}, "needs the signal 'quality', which no part here provides"),
    ],
)
def test_impossible_combinations_are_refused(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method(**slots)
    assert message in str(caught.value)


def test_sampler_goes_through_shuffled_epochs() -> None:
    def of_epoch(epoch: int) -> torch.Generator:
        return generator(0, "epoch", epoch)

    sampler = Sampler()
    drawn = torch.cat([sampler(7, count, of_epoch, draws(0)) for count in (3, 5, 6)])
    assert drawn[:7].sort().values.tolist() == drawn[7:].sort().values.tolist() == list(range(7))
    assert drawn[:7].tolist() != drawn[7:].tolist()
    assert Sampler()(3, 8, of_epoch, draws(0))[:6].sort().values.tolist() == [0, 0, 1, 1, 2, 2]
    again = Sampler()
    again.load_state_dict({"drawn": torch.tensor(3)})
    assert torch.equal(again(7, 5, of_epoch, draws(0)), drawn[3:8])


def test_budget_shares_out_everything_evenly() -> None:
    for prompts, total in ((4, 16), (4, 18), (3, 2), (1, 5)):
        counts = Budget()(torch.arange(prompts), total, draws(0))
        assert int(counts.sum()) == total
        assert int(counts.max() - counts.min()) <= 1


def test_slots_are_in_the_order_of_the_data() -> None:
    order = [
        "sampler",
        "budget",
        "shaping",
        "advantage",
        "selection",
        "surrogate",
        "regularizers",
        "optimizer",
    ]
    assert list(SLOTS) == order
    assert all(part.slot == slot for slot, part in SLOTS.items())


def test_surrogate_without_a_loss_says_so() -> None:
    batch = prepared(method(), random_batch())
    with pytest.raises(NotImplementedError):
        Surrogate()(Evaluation(batch.old_logp), batch)
