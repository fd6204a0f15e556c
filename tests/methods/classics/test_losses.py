"""The classics' losses: by hand, and the settings in which one becomes another."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polopt import make_part, recipe
from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.methods.classics.cispo import ClippedWeight
from polopt.methods.classics.entropy import EntropyBonus
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.gspo import SequenceClip
from polopt.methods.classics.kl import KLPenalty
from polopt.methods.classics.ppo import PPOClip, ValueLoss, clipped_value_loss
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.parts import Surrogate
from polopt.testing import batches, random_batch
from polopt.testing.subject import Step, Subject, prepared

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
few = settings(max_examples=25)
CLASSICS = ["reinforce", "rloo", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"]


def loss_of(surrogate: Surrogate, batch: Batch, on_policy: bool = False, **options: Any) -> Step:
    """Loss and gradient of a surrogate with GRPO's advantages."""
    method = Method(advantage=GroupStandardized(), surrogate=surrogate, **options)
    subject = Subject(method)
    batch = prepared(method, batch)
    return subject.objective(method, batch, Evaluation(batch.old_logp) if on_policy else None)


def same(a: Step, b: Step) -> None:
    assert_close(a.loss, b.loss, **EXACT)
    assert_close(a.gradient["logp"], b.gradient["logp"], **EXACT)


def test_ppo_clip_by_hand() -> None:
    batch = random_batch(groups=[6], steps=1)
    batch.mask = torch.ones(6, 1, dtype=torch.bool)
    ratio = torch.tensor([[1.5], [1.1], [0.5], [1.5], [0.9], [0.5]], dtype=torch.float64)
    batch.old_logp = torch.zeros(6, 1, dtype=torch.float64)
    batch.advantages = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    part = PPOClip(clip_low=0.2, clip_high=0.28)
    evaluation = Evaluation(ratio.log())
    loss = part.decision_loss(evaluation, batch)[:, 0].tolist()
    assert loss == pytest.approx([-1.28, -1.1, -0.5, 1.5, 0.9, 0.8])
    assert part.clipped(evaluation, batch)[:, 0].tolist() == [True, False, False, False, False, True]
    bounded = PPOClip(clip_low=0.2, clip_high=0.28, dual_clip=1.3).decision_loss(evaluation, batch)[:, 0]
    assert bounded.tolist() == pytest.approx([-1.28, -1.1, -0.5, 1.3, 0.9, 0.8])


@few
@given(batches(rewards="graded"), st.sampled_from(["token_mean", "sequence_mean", "sequence_mean_token_sum"]))
def test_on_policy_all_gradients_are_that_of_reinforce(batch: Batch, aggregation: str) -> None:
    expected = loss_of(ScoreFunction(aggregation=aggregation), batch, on_policy=True).gradient["logp"]
    for part in (PPOClip(aggregation=aggregation), ClippedWeight(aggregation=aggregation)):
        assert_close(loss_of(part, batch, on_policy=True).gradient["logp"], expected, **EXACT)
    if aggregation == "sequence_mean":
        for variant in ("sequence", "token"):
            found = loss_of(SequenceClip(variant=variant), batch, on_policy=True)
            assert_close(found.gradient["logp"], expected, **EXACT)


@few
@given(batches(rewards="graded"))
def test_dapo_is_grpo_with_another_clip_and_token_mean(batch: Batch) -> None:
    grpo = recipe("grpo", surrogate="ppo:clip_high=0.28,aggregation=token_mean")
    steps = []
    for method in (grpo, recipe("dapo", shaping=[])):
        subject = Subject(method)
        steps.append(subject.objective(method, prepared(method, batch)))
    same(*steps)


@few
@given(batches(rewards="graded", steps=1))
def test_gspo_of_single_decisions_is_ppo(batch: Batch) -> None:
    clip = {"clip_low": 0.1, "clip_high": 0.2}
    expected = loss_of(PPOClip(aggregation="sequence_mean", **clip), batch)
    for variant in ("sequence", "token"):
        same(loss_of(SequenceClip(variant=variant, **clip), batch), expected)


@few
@given(batches(rewards="graded"), st.sampled_from([3e-4, 0.05, 0.3]))
def test_gspo_token_equals_gspo_for_equal_advantages(batch: Batch, clip: float) -> None:
    options = {"clip_low": clip, "clip_high": clip}
    same(loss_of(SequenceClip(variant="token", **options), batch), loss_of(SequenceClip(**options), batch))


def test_gspo_gradient_is_equation_ten() -> None:
    batch = random_batch(rewards="graded")
    step = loss_of(SequenceClip(clip_low=0.9, clip_high=100.0), batch)
    rows = step.batch
    log_ratio = torch.where(rows.mask, step.evaluation.logp - rows.old_logp, 0.0).sum(-1)
    ratio = (log_ratio / rows.lengths.clamp(min=1)).exp()
    present = int(rows.mask.any(-1).sum())
    share = (
        ratio * rows.advantages.abs().amax(-1) * rows.advantages.sum(-1).sign() / rows.lengths.clamp(min=1)
    )
    assert_close(step.gradient["logp"], torch.where(rows.mask, -share[:, None] / present, 0.0), **EXACT)


def test_gspo_keeps_or_cuts_a_trajectory_as_a_whole() -> None:
    step = loss_of(SequenceClip(), random_batch(rewards="graded"))
    part, rows = SequenceClip(), step.batch
    clipped = part.clipped(step.evaluation.where(rows.mask), rows)
    moves = (step.gradient["logp"] != 0) & rows.mask
    assert clipped.any()
    assert not (clipped & moves).any()
    assert torch.equal(moves.any(-1), ((rows.advantages != 0) & rows.mask & ~clipped).any(-1))
    assert torch.equal(moves, moves.any(-1, keepdim=True) & rows.mask)


@few
@given(batches(rewards="graded"), st.floats(0, 0.5))
def test_cispo_is_reinforce_with_constant_clipped_weights(batch: Batch, high: float) -> None:
    step = loss_of(ClippedWeight(clip_high=high, clip_low=0.1), batch)
    rows = step.batch
    ratio = torch.where(rows.mask, step.evaluation.logp - rows.old_logp, 0.0).exp().clamp(0.9, 1 + high)
    expected = -rows.loss_weight * rows.advantages * ratio
    assert_close(step.gradient["logp"], expected, **EXACT)


def test_cispo_has_a_gradient_where_ppo_has_none() -> None:
    batch = random_batch(rewards="graded")
    batch.old_logp = batch.old_logp - 3
    cut, kept = (loss_of(part, batch).gradient["logp"] for part in (PPOClip(), ClippedWeight()))
    above = loss_of(PPOClip(), batch).batch.advantages > 0
    assert not cut[above].any()
    assert kept[above].all()


def test_cispo_leaves_small_weights_open_by_default() -> None:
    batch = random_batch(rewards="graded")
    batch.old_logp = batch.old_logp + 5
    step = loss_of(ClippedWeight(), batch)
    rows = step.batch
    assert not ClippedWeight().clipped(step.evaluation.where(rows.mask), rows).any()
    assert step.gradient["logp"].abs().max() < 0.05


@few
@given(batches(frozenset({"ref_logp"})), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_in_the_loss_has_the_gradient_of_its_estimate(batch: Batch, estimator: str) -> None:
    plain = loss_of(PPOClip(), batch)
    method = Method(
        advantage=GroupStandardized(), surrogate=PPOClip(), regularizers=[KLPenalty(estimator=estimator)]
    )
    found = Subject(method).objective(method, prepared(method, batch))
    rows = found.batch
    x = torch.where(rows.mask, rows.ref_logp - found.evaluation.logp, 0.0)
    slope = {"k1": torch.ones_like(x), "k2": -x, "k3": 1 - x.exp()}[estimator]
    expected = plain.gradient["logp"] + 0.04 * rows.loss_weight * slope
    assert_close(found.gradient["logp"], expected, **EXACT)


def test_entropy_bonus_is_its_coefficient_times_the_share_of_each_decision() -> None:
    method = Method(advantage=GroupStandardized(), surrogate=PPOClip(), regularizers=[EntropyBonus(coef=0.1)])
    step = Subject(method).step(method, random_batch())
    assert_close(step.gradient["entropy"], -0.1 * step.batch.loss_weight, **EXACT)


def test_value_loss_by_hand() -> None:
    value, old, returns = (torch.tensor([[x]]) for x in (2.0, 1.0, 3.0))
    assert float(clipped_value_loss(value, old, returns, None)) == 0.5
    assert float(clipped_value_loss(value, old, returns, 0.5)) == pytest.approx(1.125)
    assert float(clipped_value_loss(value, old, returns, 2.0)) == 0.5
    assert ValueLoss(clip=0.2).requires == {"value", "old_value", "returns"}


def test_dr_grpo_divides_by_a_constant() -> None:
    batch = random_batch(rewards="graded")
    short, long = (loss_of(PPOClip(aggregation="constant", constant=c), batch) for c in (10.0, 20.0))
    assert_close(short.gradient["logp"], 2 * long.gradient["logp"], **EXACT)
    weights: Tensor = loss_of(PPOClip(aggregation="constant"), batch).batch.loss_weight
    rows = int(batch.mask.any(-1).sum())
    assert weights[batch.mask].unique().tolist() == pytest.approx([1 / (rows * int(batch.lengths.max()))])


@pytest.mark.parametrize("name", CLASSICS)
def test_recipes_have_their_names_and_one_line(name: str) -> None:
    from polopt import recipes

    assert recipe(name).name == name
    assert len((recipes()[name].__doc__ or "").splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("surrogate ppo:clip_low=1.5", "surrogate ppo.clip_low = 1.5: "),
        ("surrogate ppo:clip_high=-0.1", "surrogate ppo.clip_high = -0.1: "),
        ("surrogate ppo:dual_clip=1.1", "dual_clip = 1.1 must be above 1 + clip_high = 1.2"),
        ("surrogate gspo:aggregation=token_mean", "surrogate gspo.aggregation = 'token_mean': "),
        ("surrogate gspo:variant=word", "surrogate gspo.variant = 'word': "),
        ("surrogate cispo:clip_low=2", "surrogate cispo.clip_low = 2: "),
        ("surrogate reinforce:clip=0.2", "surrogate reinforce.clip: unknown key; "),
        ("advantage reinforce:baseline=median", "advantage reinforce.baseline = 'median': "),
        ("advantage reinforce:decay=1.0", "advantage reinforce.decay = 1.0: "),
        ("advantage grpo:eps=0", "advantage grpo.eps = 0: "),
        ("advantage gae:gae_lambda=1.1", "advantage gae.gae_lambda = 1.1: "),
        ("regularizers kl:estimator=k4", "regularizers kl.estimator = 'k4': "),
        ("regularizers entropy:coef=-1", "regularizers entropy.coef = -1: "),
        ("shaping overlong:cache=5,max_length=4", "cache = 5 must be at most max_length = 4"),
        ("sampler dapo:rounds=0", "sampler dapo.rounds = 0: "),
    ],
)
def test_bad_options_are_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_part(*spec.split(" ", 1))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
