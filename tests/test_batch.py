"""The data of the contract: fields, signals, selection of rows, concatenation, the way into a checkpoint and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.testing import assert_close

from polopt.batch import EVALUATED, Batch, Evaluation, concatenate
from polopt.testing import batches, random_batch
from polopt.testing.compare import same
from polopt.testing.data import OPTIONAL

EVERYTHING = OPTIONAL | {f"{policy}_{name}" for policy in ("old", "ref") for name in EVALUATED}


def full_batch(seed: int = 0, groups: tuple[int, ...] = (2, 3), steps: int = 4) -> Batch:
    return random_batch(EVERYTHING, seed=seed, groups=groups, steps=steps)


def test_lengths_count_the_decisions_that_were_the_policys_own() -> None:
    batch = random_batch()
    batch.mask = torch.tensor([[True, False, True, False, False, False]]).expand(len(batch), -1)
    assert batch.lengths.tolist() == [2] * len(batch)


def test_outcome_adds_finite_rewards_and_rewards_of_decisions_inside_the_mask() -> None:
    batch = random_batch(groups=[4], steps=2)
    batch.mask = torch.tensor([[True, False]] * 4)
    nan, inf = torch.nan, torch.inf
    batch.rewards = torch.tensor([[1, 2], [nan, 2], [inf, -inf], [nan, nan]], dtype=torch.float64)
    assert batch.outcome().tolist() == [3, 2, 0, 0]
    batch.step_rewards = torch.tensor([[0.5, nan]] * 4)
    assert batch.outcome().tolist() == [3.5, 2.5, 0.5, 0.5]
    assert batch.outcome().dtype == torch.float64


def test_fields_nobody_filled_are_absent() -> None:
    batch = random_batch()
    for name in (*OPTIONAL - {"old_logp"}, "advantages", "weights", "loss_weight", "signals"):
        assert getattr(batch, name) is None, name
        assert not batch.has(name)
    with pytest.raises(KeyError, match="signal 'bundle': no part of the method provides it"):
        batch.signal("bundle")


def test_only_the_last_decision_of_a_trajectory_ended_it() -> None:
    batch = random_batch(frozenset({"terminated", "truncated"}), seed=3)
    found = batch.decisions(frozenset({"terminated", "truncated"}))
    for name in ("terminated", "truncated"):
        flags, ended = getattr(found, name).tolist(), getattr(batch, name).tolist()
        expected = [
            ended[row] and step == length - 1
            for row, length in enumerate(batch.lengths.tolist())
            for step in range(length)
        ]
        assert flags == expected and any(flags) and not all(flags)


def test_signals_are_cut_with_the_rows() -> None:
    batch = random_batch(groups=[5])
    batch.set_signal("quality", torch.arange(5.0))
    batch.set_signal("features", torch.arange(30.0).view(5, 6, 1))
    assert batch.has("quality")
    part = batch[torch.tensor([3, 1])]
    assert part.signal("quality").tolist() == [3, 1]
    assert part.signal("features")[:, 0, 0].tolist() == [18, 6]
    part.set_signal("quality", torch.zeros(2))
    assert batch.signal("quality").tolist() == [0, 1, 2, 3, 4]


def test_evaluations_become_fields_where_there_is_one_and_signals_where_not() -> None:
    batch = random_batch()
    tensor = batch.old_logp.clone()
    batch.set_evaluated("ref", Evaluation(tensor, score_sqnorm=tensor + 1))
    batch.set_evaluated("old", Evaluation(tensor + 2, value=tensor + 3))
    same(
        {"ref": batch.ref_logp, "old": batch.old_logp, "v": batch.old_value},
        {"ref": tensor, "old": tensor + 2, "v": tensor + 3},
    )
    same({"sqnorm": batch.signal("ref_score_sqnorm")}, {"sqnorm": tensor + 1})
    assert batch.has("ref_score_sqnorm")
    assert not batch.has("old_score_sqnorm")


@pytest.mark.parametrize("requires", [frozenset(), EVERYTHING])
def test_tensors_of_a_batch_make_the_same_batch_again(requires: frozenset[str]) -> None:
    batch = random_batch(requires)
    again = Batch.from_tensors(batch.to_tensors())
    same(again.to_tensors(), batch.to_tensors())
    assert len(again) == len(batch)
    assert (again.signals is None) == (batch.signals is None)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 5)),
        min_size=1,
        max_size=3,
    )
)
def test_concatenation_keeps_rows_and_merges_no_groups(parts: list[tuple[int, list[int], int]]) -> None:
    made = [full_batch(seed, tuple(groups), steps) for seed, groups, steps in parts]
    before = [b.clone() for b in made]
    joined = concatenate(made)
    assert len(joined) == sum(len(b) for b in made)
    assert joined.mask.shape[1] == max(b.mask.shape[1] for b in made)
    assert len(joined.group.unique()) == sum(len(b.group.unique()) for b in made)
    start = 0
    for batch, original in zip(made, before, strict=True):
        same(batch.to_tensors(), original.to_tensors())
        rows = joined[start : start + len(batch)]
        steps = batch.mask.shape[1]
        assert torch.equal(rows.group - rows.group.min(), batch.group - batch.group.min())
        assert not rows.mask[:, steps:].any()
        for name, tensor in batch.to_tensors().items():
            if name != "group":
                found = rows.to_tensors()[name]
                found = found[:, : tensor.shape[1]] if tensor.dim() > 1 else found
                same({name: found}, {name: tensor})
        start += len(batch)


def test_concatenation_refuses_nothing_and_mixtures() -> None:
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])
    with pytest.raises(ValueError, match="some of the batches only"):
        concatenate([random_batch(), random_batch(frozenset({"ref_logp"}))])


def test_concatenation_takes_batches_without_rows() -> None:
    batch = random_batch()
    nothing = batch[torch.zeros(len(batch), dtype=torch.bool)]
    same(concatenate([nothing, batch, nothing]).to_tensors(), batch.to_tensors())
    assert len(concatenate([nothing, nothing])) == 0


@settings(max_examples=25)
@given(batches())
def test_evaluation_where_zeroes_values_and_gradients_outside_the_mask(batch: Batch) -> None:
    leaf = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
    leaf = torch.where(batch.mask, 1.0, leaf).requires_grad_()
    evaluation = Evaluation(leaf, features=torch.full((*batch.mask.shape, 2), torch.nan)).where(batch.mask)
    assert_close(evaluation.logp, batch.mask.double())
    assert not evaluation.features[~batch.mask].any()
    (gradient,) = torch.autograd.grad(evaluation.logp.exp().sum(), leaf)
    assert_close(gradient, torch.where(batch.mask, torch.e, 0.0).double())


def test_evaluation_has_the_fields_that_were_asked_for() -> None:
    evaluation = Evaluation(torch.ones(1, 2, requires_grad=True), value=torch.zeros(1, 2))
    assert set(evaluation.tensors()) == {"logp", "value"}
    assert not evaluation.detach().logp.requires_grad
    assert evaluation.map(lambda t: t + 1).value.tolist() == [[1, 1]]
    assert evaluation.entropy is None
    assert {"logp", "entropy", "value"} <= EVALUATED


def test_rows_of_the_payload_follow() -> None:
    batch = random_batch()
    assert batch[torch.tensor([4, 2])].payload["row"].tolist() == [4, 2]
    assert isinstance(batch.payload, TensorDict)
