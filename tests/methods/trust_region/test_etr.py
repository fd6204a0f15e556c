"""Identities of the ETR card (arXiv 2601.03723, reconstructed)."""

import torch
from torch.testing import assert_close

from polopt.batch import Evaluation
from polopt.methods.classics.grpo import group_standardized
from polopt.methods.classics.ppo import PPOClip
from polopt.methods.trust_region.etr import ElasticClip, elastic_scale, group_quality
from polopt.testing import random_batch


def prepared(surrogate: ElasticClip | PPOClip, spread: float = 0.5):
    batch = random_batch(seed=0)
    batch.advantages = (group_standardized(batch.outcome(), batch.group)[:, None] * batch.mask).to(
        batch.old_logp
    )
    batch.weights = batch.mask.to(batch.old_logp)
    for name, value in surrogate.signals(batch).items():
        batch.set_signal(name, value)
    batch.loss_weight = surrogate.loss_weights(batch)
    noise = torch.randn(
        batch.old_logp.shape, generator=torch.Generator().manual_seed(1), dtype=batch.old_logp.dtype
    )
    logp = (batch.old_logp + spread * noise).requires_grad_()
    loss = surrogate(Evaluation(logp).where(batch.mask), batch)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def test_etr_without_elasticity_is_grpo() -> None:
    grpo = PPOClip(clip_high=0.28, aggregation="sequence_mean")
    assert_close(
        prepared(ElasticClip(alpha=0.0, beta=0.0, clip_high=0.28)), prepared(grpo), rtol=0.0, atol=1e-12
    )
    assert_close(
        prepared(ElasticClip(s_min=1.0, s_max=1.0, clip_high=0.28)), prepared(grpo), rtol=0.0, atol=1e-12
    )


def test_etr_with_a_fixed_scale_is_grpo_with_scaled_widths() -> None:
    grpo = PPOClip(clip_low=0.3, clip_high=0.3, aggregation="sequence_mean")
    assert_close(prepared(ElasticClip(s_min=1.5, s_max=1.5)), prepared(grpo), rtol=0.0, atol=1e-12)


def test_etr_at_ratio_one_is_grpo() -> None:
    assert_close(
        prepared(ElasticClip(), 0.0),
        prepared(PPOClip(aggregation="sequence_mean"), 0.0),
        rtol=0.0,
        atol=1e-12,
    )


def test_etr_scale_grows_with_advantage_and_quality_inside_its_bounds() -> None:
    size = torch.linspace(0, 5, 50, dtype=torch.float64)
    quality = torch.linspace(0, 1, 50, dtype=torch.float64)
    by_size = elastic_scale(size, torch.tensor(0.5), 0.5, 0.5, 0.5, 2.0)
    by_quality = elastic_scale(torch.tensor(1.0), quality, 0.5, 0.5, 0.5, 2.0)
    for scale in (by_size, by_quality):
        assert (scale.diff() >= 0).all() and scale.min() >= 0.5 and scale.max() <= 2.0


def test_etr_quality_is_four_p_one_minus_p_and_affine_invariant() -> None:
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    expected = torch.tensor([0.75] * 4 + [0.0] * 2, dtype=torch.float64)
    assert_close(group_quality(rewards, group), expected)
    assert_close(group_quality(3 * rewards - 1, group, (-1.0, 2.0)), expected)
    order = torch.tensor([5, 3, 0, 4, 1, 2])
    assert_close(group_quality(rewards[order], group[order]), expected[order])


def test_etr_gives_rare_successes_the_wider_interval() -> None:
    p, alpha = 0.25, 0.5
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    size = group_standardized(rewards, group, 1e-300, unbiased=False).abs()
    micro = elastic_scale(size, torch.tensor(0.5), alpha, 0.0, 1e-6, 1e6)
    right, wrong = 1 + alpha * (((1 - p) / p) ** 0.5 - 1), 1 + alpha * ((p / (1 - p)) ** 0.5 - 1)
    assert_close(micro, torch.tensor([right, wrong, wrong, wrong], dtype=torch.float64))


def test_etr_root_mean_square_of_the_sizes_that_its_scale_follows_is_one_in_every_mixed_group() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0.3, 0.2])
    group, alpha = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.5
    size = group_standardized(rewards, group, 1e-300, unbiased=False).abs()
    followed = (elastic_scale(size, torch.tensor(0.5), alpha, 0.0, 1e-6, 1e6) - 1) / alpha + 1
    assert_close(followed.square().view(2, 4).mean(-1), torch.ones(2, dtype=torch.float64))


def test_etr_clips_fewer_decisions_of_a_large_advantage_and_more_of_a_small_one_as_alpha_grows() -> None:
    ratio = torch.linspace(1, 1.6, 61, dtype=torch.float64)
    for size, order in ((1.5, 1), (0.5, -1)):
        widths = [
            elastic_scale(torch.tensor(size), torch.tensor(0.5), a, 0.0, 0.5, 2.0) for a in (0.0, 0.4, 0.8)
        ]
        clipped = [int((ratio > 1 + 0.2 * width).sum()) for width in widths]
        assert clipped == sorted(clipped, reverse=order > 0) and len(set(clipped)) == 3
