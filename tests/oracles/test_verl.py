"""verl's core_algos on the same batches: advantages, losses and gradients agree to 1e-6 in float64.

Where the two libraries differ:

- a group of one has advantage R in verl (its mean counts 0, its deviation 1), and 0 in ours;
- whitening: verl divides by sqrt(unbiased variance + 1e-8), ours by biased standard deviation + 1e-8; verl's whitened
  advantages are not 0 outside the mask;
- verl multiplies by its masks, so values outside them must be finite; ours may be anything;
- the dual clip is always on in verl (3), off in ours unless `dual_clip` is set;
- GSPO is GSPO-token in verl, whose value and gradient are those of GSPO for advantages that are equal inside a sequence;
- CISPO's lower side is clipped in verl (0.2), open in ours unless `clip_low` is set;
- k3 is bounded by 10 in verl, by e^20 in ours;
- `seq-mean-token-sum-norm` divides by the padded width in verl, by the longest trajectory in ours unless `constant` is set.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from polopt.batch import Batch
from polopt.functional.aggregation import aggregation_weights
from polopt.functional.divergence import kl_estimate
from polopt.functional.masked import standardize
from polopt.functional.returns import outcome_at_last
from polopt.methods.classics.cispo import ClippedWeight
from polopt.methods.classics.dr_grpo import GroupCentred
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.gspo import SequenceClip
from polopt.methods.classics.ppo import GAE, PPOClip, clipped_value_loss
from polopt.methods.classics.rloo import LeaveOneOut
from polopt.parts import Advantage
from tests.oracles.common import LIMITS, SEEDS, evaluate, other_library, our_loss, ragged_batch

core_algos = other_library("verl.trainer.ppo.core_algos")
ActorConfig = other_library("verl.workers.config").ActorConfig
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
each_seed = pytest.mark.parametrize("seed", SEEDS)
GROUPS = (4, 1, 3, 5)


def index_of(batch: Batch) -> np.ndarray:
    return np.array([str(g) for g in batch.group.tolist()], dtype=object)


def rewards_of(batch: Batch) -> Tensor:
    return outcome_at_last(batch.outcome(), batch.mask)


@each_seed
@pytest.mark.parametrize(
    ("part", "function", "options"),
    [
        (GroupStandardized(), "compute_grpo_outcome_advantage", {}),
        (GroupCentred(), "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        (LeaveOneOut(), "compute_rloo_outcome_advantage", {}),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_group_relative_advantages_agree(
    part: Advantage, function: str, options: dict[str, Any], seed: int
) -> None:
    batch = ragged_batch(seed, GROUPS)
    mask = batch.mask.double()
    theirs, _ = getattr(core_algos, function)(rewards_of(batch), mask, index_of(batch), **options)
    alone = (batch.group == 1)[:, None]
    found = part(batch).expand(mask.shape) * mask
    assert_close(torch.where(alone, 0.0, found), torch.where(alone, 0.0, theirs), **LIMITS)
    assert_close(theirs[batch.group == 1], batch.rewards[batch.group == 1] * mask[batch.group == 1], **LIMITS)
    assert not found[batch.group == 1].any()


@each_seed
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_generalised_advantages_and_returns_agree(gamma: float, lam: float, seed: int) -> None:
    batch = ragged_batch(seed, GROUPS, frozenset({"old_value"}))
    part = GAE(gamma=gamma, gae_lambda=lam)
    mask = batch.mask.double()
    theirs, returns = core_algos.compute_gae_advantage_return(
        rewards_of(batch), batch.old_value, mask, gamma, lam
    )
    assert_close(part.signals(batch)["returns"][batch.mask], returns[batch.mask], **LIMITS)
    raw, count = part.raw(batch)[batch.mask], int(mask.sum())
    assert_close(raw, (returns - batch.old_value)[batch.mask], **LIMITS)
    factor = raw.std(correction=0) / (raw.var() + 1e-8).sqrt()
    whitened = standardize(part.raw(batch), batch.mask)[batch.mask]
    assert count > 1
    assert_close(whitened * factor, theirs[batch.mask], **LIMITS)


@each_seed
@pytest.mark.parametrize(
    ("mode", "aggregation"),
    [
        ("token-mean", "token_mean"),
        ("seq-mean-token-mean", "sequence_mean"),
        ("seq-mean-token-sum", "sequence_mean_token_sum"),
        ("seq-mean-token-sum-norm", "constant"),
    ],
)
def test_aggregations_agree_with_empty_trajectories_too(mode: str, aggregation: Any, seed: int) -> None:
    batch = ragged_batch(seed, GROUPS)
    batch.mask[2] = False
    ones, width = batch.mask.double(), batch.mask.shape[1]
    share = aggregation_weights(batch.mask, ones, batch.group, aggregation, constant=width)
    theirs = core_algos.agg_loss(batch.old_logp, ones, mode)
    assert_close((share * batch.old_logp).sum(), theirs, **LIMITS)


def their_loss(batch: Batch, name: str, mode: str, **options: Any) -> tuple[Tensor, Tensor]:
    """verl's loss and its gradient with respect to the log-probabilities."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    logp, _ = evaluate(batch)
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=batch.old_logp, log_prob=logp, advantages=batch.advantages,
        response_mask=batch.mask.double(), loss_agg_mode=mode, config=config,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


@each_seed
@pytest.mark.parametrize(
    ("surrogate", "name", "mode", "options"),
    [
        (PPOClip(dual_clip=3, aggregation="sequence_mean"), "vanilla", "seq-mean-token-mean", {}),
        (PPOClip(dual_clip=3, aggregation="sequence_mean_token_sum"), "vanilla", "seq-mean-token-sum", {}),
        (
            PPOClip(dual_clip=1.5, clip_high=0.28),
            "vanilla",
            "token-mean",
            {"clip_ratio_high": 0.28, "clip_ratio_c": 1.5},
        ),
        (
            SequenceClip(),
            "gspo",
            "seq-mean-token-mean",
            {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
        ),
        (
            ClippedWeight(clip_low=0.1, clip_high=0.15),
            "cispo",
            "token-mean",
            {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15},
        ),
    ],
    ids=["grpo", "sequence_sum", "dapo", "gspo", "cispo"],
)
def test_losses_and_gradients_agree(
    surrogate: Any, name: str, mode: str, options: dict[str, Any], seed: int
) -> None:
    loss, gradient, batch = our_loss(surrogate, ragged_batch(seed, GROUPS))
    their, their_gradient = their_loss(batch, name, mode, **options)
    assert_close(loss, their, **LIMITS)
    assert_close(gradient, their_gradient, **LIMITS)
    assert gradient.abs().max() > 1e-4


@each_seed
@pytest.mark.parametrize("clip", [0.05, 0.5])
def test_value_losses_agree(clip: float, seed: int) -> None:
    batch = ragged_batch(seed, GROUPS, frozenset({"old_value"}))
    value, returns = batch.old_value + 0.3 * batch.old_logp, batch.old_value.flip(0)
    theirs, _ = core_algos.compute_value_loss(value, returns, batch.old_value, batch.mask.double(), clip)
    found = clipped_value_loss(value, batch.old_value, returns, clip)
    assert_close(found[batch.mask].mean(), theirs, **LIMITS)


@each_seed
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_estimates_agree(estimator: Any, seed: int) -> None:
    batch = ragged_batch(seed, GROUPS, frozenset({"ref_logp"}))
    logp, _ = evaluate(batch)
    theirs = core_algos.kl_penalty_forward(logp, batch.ref_logp, estimator)
    assert_close(
        kl_estimate(logp, batch.ref_logp, batch.mask, estimator)[batch.mask], theirs[batch.mask], **LIMITS
    )
