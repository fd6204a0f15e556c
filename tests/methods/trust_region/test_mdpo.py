"""Identities of the MDPO card (arXiv 2005.09814)."""

from typing import Any

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.testing import assert_close

import polopt
from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.divergence import categorical_kl, gaussian_kl
from polopt.functional.masked import standardize
from polopt.methods.classics.ppo import PPOClip
from polopt.methods.classics.sac import soft_q_target, soft_value_target
from polopt.methods.trust_region.mdpo import (
    MirrorDescent,
    annealed_step,
    mirror_loss,
    mirror_step,
    sampled_divergence,
    soft_policy_loss,
    tsallis_log,
)
from polopt.miniature import SumModActor, SumModTask
from polopt.testing import check_method
from polopt.testing.tabular import TabularMDP

STATES, ACTIONS = 7, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_policy(seed: int = 0) -> torch.Tensor:
    return normal(STATES, ACTIONS, seed=seed).softmax(-1)


def objective(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, t: float) -> torch.Tensor:
    """(D1) of each state, by the definition."""
    return (new * advantages).sum(-1) - kl_divergence(Categorical(new), Categorical(old)) / t


def a_batch(seed: int = 0) -> Batch:
    """One decision a row, behaviour policy of its own, half a decision row masked with NaN below."""
    old = normal(12, 3, seed=seed) - 1
    mask = torch.ones(12, 3, dtype=torch.bool)
    mask[::2, 2] = False
    batch = Batch(
        mask=mask, old_logp=torch.where(mask, old, torch.nan), rewards=torch.zeros(12, 1),
        group=torch.arange(12) // 4, prompt_id=torch.arange(12), batch_size=[12],
    )  # fmt: skip
    batch.weights, batch.advantages = mask.double(), torch.where(mask, normal(12, 3, seed=seed + 1), 0.0)
    return batch


def gradient(part: Any, batch: Batch, shift: torch.Tensor, kl: torch.Tensor | None = None) -> torch.Tensor:
    batch.loss_weight = part.loss_weights(batch)
    logp = (batch.old_logp + shift).requires_grad_()
    evaluation = Evaluation(logp) if kl is None else Evaluation(logp, kl=kl)
    return torch.autograd.grad(part(evaluation.where(batch.mask), batch), logp)[0]


@pytest.mark.parametrize("t", [0.1, 1.0, 8.0])
def test_mirror_step_is_the_kl_regularised_optimum_with_the_stated_value(t: float) -> None:
    old, advantages = a_policy(), normal(STATES, ACTIONS, seed=1)
    found = mirror_step(old, advantages, t)
    assert_close(found.kl, kl_divergence(Categorical(found.policy), Categorical(old)))
    assert_close(found.objective, objective(found.policy, old, advantages, t))
    assert_close(found.objective, (old * (t * advantages).exp()).sum(-1).log() / t)
    for seed in range(20):
        other = (found.policy.log() + 0.3 * normal(STATES, ACTIONS, seed=10 + seed)).softmax(-1)
        assert (objective(other, old, advantages, t) < found.objective).all()


def test_mirror_step_ignores_a_shift_of_the_advantages_in_a_state() -> None:
    advantages, shift = normal(STATES, ACTIONS, seed=1), normal(STATES, 1, seed=2)
    plain, moved = (mirror_step(a_policy(), a, 0.7) for a in (advantages, advantages + 100 * shift))
    assert_close(moved.policy, plain.policy, rtol=1e-9, atol=1e-12)
    assert_close(moved.kl, plain.kl, rtol=1e-9, atol=1e-9)


def test_two_mirror_steps_are_one_of_the_summed_size() -> None:
    advantages = normal(STATES, ACTIONS, seed=1)
    twice = mirror_step(mirror_step(a_policy(), advantages, 0.4).policy, advantages, 1.1).policy
    assert_close(twice, mirror_step(a_policy(), advantages, 1.5).policy)


def test_large_mirror_step_is_greedy_and_small_one_stays() -> None:
    advantages = normal(STATES, ACTIONS, seed=1)
    greedy = torch.nn.functional.one_hot(advantages.argmax(-1), ACTIONS).double()
    assert_close(mirror_step(a_policy(), advantages, 1e6).policy, greedy)
    assert_close(mirror_step(a_policy(), advantages, 1e-9).policy, a_policy(), rtol=1e-7, atol=0.0)


def test_mirror_step_leaves_impossible_actions_impossible() -> None:
    old = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64)
    found = mirror_step(old, torch.tensor([[9.0, 1.0, -1.0]], dtype=torch.float64), 1.0)
    assert found.policy[0, 0] == 0 and found.policy.sum().item() == pytest.approx(1)
    assert found.kl.isfinite().all() and found.objective.isfinite().all()


@pytest.mark.parametrize("t", [0.05, 0.5, 5.0, 50.0])
def test_every_mirror_step_with_exact_advantages_raises_all_values(t: float) -> None:
    for seed in range(3):
        mdp = TabularMDP.random(seed, states=12)
        policy = torch.full_like(mdp.reward, 1 / mdp.reward.shape[1])
        before = mdp.evaluate(policy)
        for _ in range(30):
            policy = mirror_step(policy, before.advantage, t).policy
            after = mdp.evaluate(policy)
            assert (after.value >= before.value - 1e-12).all()
            before = after


def test_divergences_are_those_of_torch_distributions() -> None:
    new, old = normal(STATES, ACTIONS), normal(STATES, ACTIONS, seed=1)
    assert_close(categorical_kl(new, old), kl_divergence(Categorical(logits=new), Categorical(logits=old)))
    mean, old_mean = normal(STATES, 3), normal(STATES, 3, seed=1)
    log_std, old_log_std = normal(3, seed=2), normal(STATES, 3, seed=3)
    expected = kl_divergence(
        Independent(Normal(mean, log_std.exp().expand(STATES, 3)), 1),
        Independent(Normal(old_mean, old_log_std.exp()), 1),
    )
    assert_close(gaussian_kl(mean, log_std, old_mean, old_log_std), expected)
    assert gaussian_kl(mean, log_std, mean, log_std).abs().max() == 0


def test_divergences_have_the_new_policy_first_and_the_old_constant() -> None:
    new, old = (normal(STATES, ACTIONS, seed=s).requires_grad_() for s in (0, 1))
    assert not torch.allclose(categorical_kl(new, old), categorical_kl(old, new))
    assert torch.autograd.grad(categorical_kl(new, old).sum(), old, allow_unused=True) == (None,)


@pytest.mark.parametrize("kl", ["sampled", "exact"])
@pytest.mark.parametrize("t", [0.01, 1.0, 1e6])
def test_first_step_is_the_plain_policy_gradient_and_ppos_whatever_the_step_size(kl: Any, t: float) -> None:
    logits = normal(STATES, ACTIONS).requires_grad_()
    action, advantages = torch.arange(STATES) % ACTIONS, normal(STATES, seed=1)
    logp = logits.log_softmax(-1).gather(-1, action[:, None])
    batch = Batch(
        mask=torch.ones(STATES, 1, dtype=torch.bool), old_logp=logp.detach(), rewards=torch.zeros(STATES, 1),
        group=torch.arange(STATES), prompt_id=torch.arange(STATES), batch_size=[STATES],
    )  # fmt: skip
    batch.weights, batch.advantages = batch.mask.double(), advantages[:, None]
    evaluation = Evaluation(logp, kl=categorical_kl(logits, logits)[:, None])
    found: list[torch.Tensor] = []
    for part in (MirrorDescent(kl=kl, step=t, schedule="constant"), PPOClip()):
        batch.loss_weight = part.loss_weights(batch)
        found += torch.autograd.grad(part(evaluation, batch), logits, retain_graph=True)
    found += torch.autograd.grad(-(advantages * logp[:, 0]).mean(), logits)
    assert_close(found[0], found[2], rtol=1e-9, atol=1e-12)
    assert_close(found[1], found[2], rtol=1e-9, atol=1e-12)


def test_trained_with_one_step_per_rollout_mdpo_is_grpo() -> None:
    def weights(name: str, **config: Any) -> list[torch.Tensor]:
        task = SumModTask()
        sizes = polopt.TrainerConfig(
            iterations=4, prompts=6, rollouts=4, lr=0.01, max_grad_norm=0.5, **config
        )
        trainer = polopt.Trainer(SumModActor(task), task, polopt.recipe(name), sizes)
        trainer.run()
        return [p.detach() for p in trainer.actor.module.parameters()]

    assert_close(weights("mdpo", epochs=1), weights("grpo"), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weights("mdpo", epochs=3)[0], weights("grpo", epochs=3)[0])


@pytest.mark.parametrize("t", [0.25, 1.0, 2.0])
def test_sampled_loss_is_least_at_the_exponential_of_the_scaled_advantage(t: float) -> None:
    advantages = torch.linspace(-3, 3, 25, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return mirror_loss(x.exp(), advantages, sampled_divergence(x, torch.zeros_like(x)), t)

    best = (t * advantages).requires_grad_()
    (slope,) = torch.autograd.grad(loss(best).sum(), best)
    assert slope.abs().max() < 1e-10
    for shift in (-0.1, 0.1):
        assert (loss(best + shift) > loss(best)).all()


def test_sampled_divergence_is_zero_at_ratio_one_only_and_positive_elsewhere() -> None:
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    assert sampled_divergence(torch.zeros(1), torch.zeros(1)) == 0
    assert (sampled_divergence(x, torch.zeros_like(x))[x != 0] > 0).all()
    assert_close(sampled_divergence(x, x), x.exp() * x - x.exp() + 1, rtol=1e-9, atol=1e-12)


def test_sampled_gradient_is_the_stated_closed_form() -> None:
    batch, t = a_batch(), 0.25
    shift = 0.4 * normal(12, 3, seed=5)
    found = gradient(MirrorDescent(step=t, schedule="constant"), batch, shift)
    ratio = shift.exp()
    expected = batch.mask / batch.mask.sum() * (ratio * shift / t - ratio * batch.advantages)
    assert_close(found, expected)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 1.5])
def test_sampled_divergence_equals_its_exact_form_in_expectation_with_its_gradient(q: float) -> None:
    logits, old = normal(STATES, ACTIONS).requires_grad_(), normal(STATES, ACTIONS, seed=1).log_softmax(-1)
    new = logits.log_softmax(-1)
    sampled = (old.exp() * sampled_divergence(new - old, old, q)).sum(-1)
    p, p_old = new.exp(), old.exp()
    exact = (p * (tsallis_log(p, q) - tsallis_log(p_old, q)) - (p - p_old) * p_old ** (1 - q)).sum(-1)
    if q == 1:
        assert_close(exact, categorical_kl(logits, old))
    assert_close(sampled, exact)
    grads = (torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (sampled, exact))
    assert_close(*grads)


@pytest.mark.parametrize("q", [0.0, 0.5, 0.999, 1.5, 1.9])
def test_tsallis_divergence_is_positive_off_the_old_policy_and_flat_at_it(q: float) -> None:
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    old = torch.full_like(x, -1.3)
    assert (sampled_divergence(x, old, q)[x.abs() > 1e-6] > 0).all()
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = sampled_divergence(zero, old[:1], q)
    assert value.item() == 0 and torch.autograd.grad(value.sum(), zero)[0].item() == pytest.approx(0)


def test_tsallis_logarithm_tends_to_the_natural_one_and_has_its_known_orders() -> None:
    x = torch.tensor([0.0, 0.01, 0.5, 1.0, 2.0, 1e100], dtype=torch.float64)
    assert_close(tsallis_log(x, 0.0), x - 1)
    assert_close(tsallis_log(x[1:], 2.0), 1 - 1 / x[1:])
    assert_close(tsallis_log(x[1:], 1 + 1e-9), x[1:].log(), rtol=1e-6, atol=1e-9)
    assert tsallis_log(x, 1.0)[0] == -torch.inf and tsallis_log(x, 0.5)[0] == -2


def test_difference_form_is_the_unweighted_difference_of_logarithms_of_order_two_minus_q() -> None:
    batch, q = a_batch(), 0.4
    shift = 0.3 * normal(12, 3, seed=5)
    part = MirrorDescent(kl="difference", tsallis=q, step=0.5, schedule="constant")
    batch.loss_weight = part.loss_weights(batch)
    logp = batch.old_logp + shift
    order = 2 - q
    penalty = tsallis_log(logp.exp(), order) - tsallis_log(batch.old_logp.exp(), order)
    expected = torch.where(batch.mask, penalty / 0.5 - shift.exp() * batch.advantages, 0.0).sum()
    assert_close(part(Evaluation(logp).where(batch.mask), batch), expected / batch.mask.sum())


def test_off_policy_loss_with_equal_weights_is_soft_actor_critics() -> None:
    logp, old, q = (normal(9, seed=s) for s in range(3))
    assert_close(soft_policy_loss(logp, old, q, 0.2, 0.2), 0.2 * logp - q)


def test_off_policy_loss_at_temperature_zero_is_the_proximal_improvement() -> None:
    logp, old, q = (normal(9, seed=s) for s in range(3))
    assert_close(soft_policy_loss(logp, old, q, 0.0, 1.7), 1.7 * (logp - old) - q)


def test_off_policy_loss_of_another_order_tends_to_the_natural_one_and_keeps_its_zero() -> None:
    logp, old, q = (normal(9, seed=s) for s in range(3))
    natural = soft_policy_loss(logp, old, q, 0.2, 1.3)
    assert_close(soft_policy_loss(logp, old, q, 0.2, 1.3, tsallis=1 + 1e-9), natural, rtol=1e-6, atol=1e-7)
    assert_close(soft_policy_loss(logp, logp, q, 0.2, 1.3, tsallis=0.5), 0.2 * logp - q)
    order_two = 1.3 * (old.neg().exp() - logp.neg().exp()) + 0.2 * old - q
    assert_close(soft_policy_loss(logp, old, q, 0.2, 1.3, tsallis=0.0), order_two)


def test_critic_targets_take_the_smaller_critic_stop_at_the_end_and_are_constant() -> None:
    q1, q2, logp, value = (normal(9, seed=s).requires_grad_() for s in range(4))
    target = soft_value_target(q1, q2, logp, 0.2)
    assert_close(target, torch.minimum(q1, q2).detach() - 0.2 * logp.detach())
    done = (torch.arange(9) % 2).double()
    backup = soft_q_target(torch.ones(9, dtype=torch.float64), done, value, 0.99)
    assert_close(backup, torch.where(done > 0, 1.0, 1 + 0.99 * value.detach()))
    assert not target.requires_grad and not backup.requires_grad


def test_exact_loss_has_a_logit_gradient_that_sums_to_zero_in_every_state() -> None:
    logits, old = normal(STATES, ACTIONS).requires_grad_(), normal(STATES, ACTIONS, seed=1)
    logp = logits.log_softmax(-1)[:, 0] - old.log_softmax(-1)[:, 0]
    loss = mirror_loss(logp.exp(), normal(STATES, seed=2), categorical_kl(logits, old), 0.3).mean()
    (found,) = torch.autograd.grad(loss, logits)
    assert found.abs().max() > 0.01 and found.sum(-1).abs().max() < 1e-12


def test_huge_step_size_is_the_unclipped_importance_weighted_policy_gradient() -> None:
    batch, shift = a_batch(), normal(12, 3, seed=5)
    found = gradient(MirrorDescent(step=1e12, schedule="constant"), batch, shift)
    expected = torch.where(batch.mask, -shift.exp() * batch.advantages, 0.0) / batch.mask.sum()
    assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_step_size_falls_linearly_to_its_floor_unless_constant() -> None:
    assert [annealed_step(p, 1.0, 0.1) for p in (0.0, 0.5, 0.95, 1.0)] == [1.0, 0.5, 0.1, 0.1]
    falling, constant = MirrorDescent(floor=0.02), MirrorDescent(schedule="constant", step=0.7)
    falling.progress = constant.progress = 1.0
    assert falling.step_size == 0.02 and constant.step_size == 0.7


def test_exact_divergence_is_required_of_the_domain_and_is_natural() -> None:
    assert MirrorDescent(kl="exact").requires == {"kl"} and not MirrorDescent().requires
    with pytest.raises(ConfigError, match=r"tsallis = 0\.5: needs"):
        MirrorDescent(kl="exact", tsallis=0.5)
    task = SumModTask()
    with pytest.raises(ConfigError, match="needs 'kl'"):
        polopt.Trainer(SumModActor(task), task, polopt.recipe("mdpo", surrogate="mdpo:kl=exact"))


def test_exact_divergence_is_averaged_like_the_loss() -> None:
    batch, t = a_batch(), 0.5
    part, kl = MirrorDescent(kl="exact", step=t, schedule="constant"), normal(12, 3, seed=8).square()
    batch.loss_weight = part.loss_weights(batch)
    loss = part(Evaluation(batch.old_logp, kl=kl).where(batch.mask), batch)
    assert_close(loss, (kl[batch.mask] / t - batch.advantages[batch.mask]).mean())


def test_advantages_of_a_batch_without_variance_are_zero_and_others_standard() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    assert not standardize(torch.full((4, 3), 0.1), mask).any()
    found = standardize(normal(4, 3), mask)
    assert found.mean().item() == pytest.approx(0, abs=1e-9)
    assert found.square().mean().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("domain", [None, "control"])
def test_both_forms_pass_the_battery(domain: str | None) -> None:
    check_method(polopt.recipe("mdpo", domain))


@pytest.mark.parametrize(
    "options", [{"tsallis": 0.5}, {"tsallis": 1.7}, {"kl": "difference", "tsallis": 1.7}]
)
def test_other_divergences_pass_the_battery(options: dict[str, Any]) -> None:
    check_method(polopt.recipe("mdpo").with_parts(surrogate=MirrorDescent(**options)))
