"""The policy that made the rollouts, and the sampler that drew in its place."""

import torch

from polopt.batch import Evaluation
from polopt.engine.behaviour import anchored, anchors, sampler_weight
from polopt.miniature import SumModActor, SumModTask
from polopt.testing import random_batch
from polopt.trainer_config import TrainerConfig


def test_only_the_one_update_of_an_inexact_sampler_anchors_itself() -> None:
    actor = SumModActor(SumModTask())
    assert not anchors(actor, TrainerConfig())
    actor.exact_sampler = False
    assert anchors(actor, TrainerConfig())
    assert not anchors(actor, TrainerConfig(epochs=2)) and not anchors(actor, TrainerConfig(minibatches=2))


def test_the_weight_is_behaviour_over_sampler_up_to_the_cap_and_1_outside_the_mask() -> None:
    batch = random_batch(seed=0)
    factors = torch.tensor([0.5, 1.0, 1.5, 3.0]).repeat(batch.mask.numel())[: batch.mask.numel()]
    factors = factors.view(batch.mask.shape).to(batch.old_logp)
    batch.sampler_logp = batch.old_logp - factors.log()
    found = sampler_weight(batch, 2.0)
    torch.testing.assert_close(found, torch.where(batch.mask, factors.clamp(max=2.0), 1.0))


def test_an_anchored_batch_takes_the_evaluation_for_its_behaviour_policy_and_changes_a_copy() -> None:
    batch = random_batch(seed=0)
    batch.loss_weight = batch.mask.to(batch.old_logp)
    batch.sampler_logp, old = batch.old_logp, batch.old_logp.clone()
    evaluation = Evaluation((batch.old_logp.detach() - 0.1).requires_grad_())
    found = anchored(evaluation, batch, 2.0)
    assert torch.equal(found.old_logp[batch.mask], evaluation.logp[batch.mask])
    assert not found.old_logp.requires_grad
    torch.testing.assert_close(
        found.loss_weight[batch.mask], torch.full_like(old, 0.1).neg().exp()[batch.mask]
    )
    assert torch.equal(batch.old_logp[batch.mask], old[batch.mask])
    assert torch.equal(batch.loss_weight, batch.mask.to(old))
