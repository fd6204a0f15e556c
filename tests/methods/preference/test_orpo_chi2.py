"""Identities of the occupancy ORPO card (arXiv 2403.03185)."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Beta, Normal
from torch.testing import assert_close

from polopt import Trainer, TrainerConfig, recipe
from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.divergence import gaussian_kl
from polopt.methods.preference.orpo_chi2 import (
    ActionDivergence,
    ActionSqrtChi2,
    SequenceChi2,
    SequenceChi2Reward,
    sampled_action_divergence,
)
from polopt.methods.preference.orpo_discriminator import (
    Discriminator,
    discriminator_loss,
    divergence_estimate,
    initial_weights,
    occupancy_penalty,
    perceptron,
    perceptron_shapes,
    train_discriminator,
)
from polopt.methods.preference.orpo_divergences import (
    action_penalty,
    beta_chi2,
    categorical_chi2,
    categorical_kl,
    gaussian_chi2,
    hacking_lower_bound,
    occupancy_measure,
    sampled_penalty,
    sequence_divergence,
)
from polopt.methods.preference.orpo_occupancy import OccupancyPenalty
from polopt.miniature import SumModActor, SumModTask
from polopt.testing import check_method, random_batch
from polopt.testing.subject import draws

SEEDS = st.integers(0, 2**31 - 1)
OPTIONS: dict[str, Any] = {"width": 16, "epochs": 3, "minibatch": 16, "lr": 1e-2}


class Table:
    """A random decision process with a policy, a reference, a true and a proxy reward."""

    def __init__(self, seed: int, states: int = 5, actions: int = 3, gamma: float = 0.9) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.gamma = gamma
        self.transitions = normal(states, actions, states).mul(2).softmax(-1)
        self.initial = normal(states).softmax(-1)
        self.logits, self.reference_policy = normal(states, actions), normal(states, actions).softmax(-1)
        self.reward = normal(states, actions)
        self.proxy = self.reward + 0.7 * normal(states, actions)
        self.reference = self.occupancy(self.reference_policy)

    def occupancy(self, policy: Tensor) -> Tensor:
        return occupancy_measure(self.transitions, self.initial, policy, self.gamma)


# Tables


@given(SEEDS, st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_orpo_true_return_is_at_least_the_bound(seed: int, gamma: float) -> None:
    table = Table(seed, gamma=gamma)
    found = hacking_lower_bound(
        table.occupancy(table.logits.softmax(-1)), table.reference, table.reward, table.proxy
    )
    assert found.true_return >= found.bound - 1e-9


@given(SEEDS, st.floats(0.05, 0.95))
def test_orpo_bound_is_tight_for_a_proxy_along_the_occupancy_ratio(seed: int, r: float) -> None:
    table = Table(seed)
    policy, reference = table.occupancy(table.logits.softmax(-1)), table.reference
    chi2 = categorical_chi2(policy.flatten(), reference.flatten())
    w = (policy / reference - 1) / chi2.sqrt()
    z = table.reward - (reference * table.reward).sum()
    z = z - w * (reference * z * w).sum()
    z = z / (reference * z.square()).sum().sqrt()
    found = hacking_lower_bound(policy, reference, z, r * z + (1 - r * r) ** 0.5 * w)
    assert found.correlation.item() == pytest.approx(r, abs=1e-9)
    assert found.true_return.item() == pytest.approx(found.bound.item(), abs=1e-9 / r)
    assert found.true_return.item() == pytest.approx(found.reference_return.item(), abs=1e-9)


@given(SEEDS)
def test_orpo_gradient_of_the_objective_is_the_policy_gradient_of_the_augmented_reward(seed: int) -> None:
    table, coef = Table(seed), 0.3

    def occupancy(logits: Tensor) -> Tensor:
        return table.occupancy(logits.softmax(-1))

    logits = table.logits.clone().requires_grad_()
    policy = occupancy(logits)
    chi2 = categorical_chi2(policy.flatten(), table.reference.flatten())
    (direct,) = torch.autograd.grad((policy * table.proxy).sum() - coef * chi2.sqrt(), logits)
    ratio = (policy / table.reference).detach()
    augmented = table.proxy - coef * ratio / chi2.detach().sqrt()
    (augmented_gradient,) = torch.autograd.grad((occupancy(logits) * augmented).sum(), logits)
    assert_close(direct, augmented_gradient, rtol=1e-8, atol=1e-10)


@given(SEEDS)
def test_orpo_one_step_occupancy_chi2_is_the_mean_action_chi2(seed: int) -> None:
    table = Table(seed, gamma=0.0)
    policy = table.logits.softmax(-1)
    occupancy = categorical_chi2(table.occupancy(policy).flatten(), table.reference.flatten())
    assert_close(occupancy, (table.initial * categorical_chi2(policy, table.reference_policy)).sum())


@given(SEEDS)
def test_orpo_occupancy_measure_sums_to_one_and_flows(seed: int) -> None:
    table = Table(seed)
    mu = table.occupancy(table.logits.softmax(-1))
    assert mu.sum().item() == pytest.approx(1.0)
    inflow = torch.einsum("sa,sat->t", mu, table.transitions)
    assert_close(mu.sum(-1), (1 - table.gamma) * table.initial + table.gamma * inflow)


@given(SEEDS)
def test_orpo_kl_is_at_most_the_logarithm_of_one_plus_chi2(seed: int) -> None:
    table = Table(seed)
    policy, reference = table.occupancy(table.logits.softmax(-1)).flatten(), table.reference.flatten()
    chi2, kl = categorical_chi2(policy, reference), categorical_kl(policy, reference)
    assert 0 <= kl <= torch.log1p(chi2) + 1e-12
    assert categorical_chi2(reference, reference) == 0


@given(SEEDS)
def test_orpo_mean_inverse_occupancy_ratio_is_one_on_current_steps(seed: int) -> None:
    table = Table(seed)
    policy = table.occupancy(table.logits.softmax(-1))
    score = (policy / table.reference).log()
    assert (policy * (-score).exp()).sum().item() == pytest.approx(1.0)
    chi2 = (policy * torch.expm1(score)).sum()
    assert_close(chi2, categorical_chi2(policy.flatten(), table.reference.flatten()))


def test_orpo_perfect_proxy_needs_no_regularisation() -> None:
    table = Table(0)
    policy = table.occupancy(table.logits.softmax(-1))
    found = hacking_lower_bound(policy, table.reference, table.reward, 3 * table.reward + 1)
    assert found.correlation.item() == pytest.approx(1.0)
    assert found.coef.item() == pytest.approx(0.0, abs=1e-6)
    assert found.bound.item() == pytest.approx(found.true_return.item(), abs=1e-6)


def test_orpo_coefficient_scales_with_the_proxy() -> None:
    table = Table(0)
    policy = table.occupancy(table.logits.softmax(-1))
    one, five = (hacking_lower_bound(policy, table.reference, table.reward, c * table.proxy) for c in (1, 5))
    assert_close(five.coef, 5 * one.coef)
    assert_close(five.bound, one.bound)


def test_orpo_a_state_the_reference_never_reaches_makes_the_bound_empty() -> None:
    table = Table(0)
    reference = table.reference.clone()
    reference[0, 0], reference[0, 1] = 0.0, reference[0, 1] + reference[0, 0]
    found = hacking_lower_bound(
        table.occupancy(table.logits.softmax(-1)), reference, table.reward, table.proxy
    )
    assert found.chi2 == torch.inf
    assert found.bound == -torch.inf


# Scores of a discriminator


def test_orpo_fewer_steps_than_a_trim_are_not_trimmed() -> None:
    scores = torch.linspace(-1, 2, 99, dtype=torch.float64)
    assert_close(divergence_estimate(scores, "chi2", 0.01), torch.expm1(scores).mean())
    longer = torch.linspace(-1, 2, 300, dtype=torch.float64)
    assert_close(divergence_estimate(longer, "chi2", 0.01), torch.expm1(longer[3:-3]).mean())


def test_orpo_penalty_is_unscaled_where_the_estimate_is_not_positive() -> None:
    scores = torch.tensor([-1.0, -0.5, 0.2], dtype=torch.float64)
    assert_close(occupancy_penalty(scores, "sqrt_chi2", 0.1, 10.0), -0.1 * torch.expm1(scores))


def test_orpo_penalty_is_bounded_and_zero_where_the_distance_is_not_finite() -> None:
    scores = torch.tensor([-1.0, 3.0, 20.0], dtype=torch.float64)
    assert occupancy_penalty(scores, "chi2", 1.0, 7.0).tolist()[1:] == [-7.0, -7.0]
    scores[2] = 1000.0
    assert occupancy_penalty(scores, "chi2", 1.0, 7.0)[2] == 0


def test_orpo_chi2_score_penalty_is_the_gradient_of_the_root() -> None:
    table = Table(3)
    policy = table.occupancy(table.logits.softmax(-1)).detach().requires_grad_()
    chi2 = (policy.square() / table.reference).sum() - 1
    (gradient,) = torch.autograd.grad(0.4 * chi2.sqrt(), policy)
    repeated = torch.multinomial(policy.detach().flatten(), 500_000, True, generator=torch.Generator())
    scores = (policy / table.reference).detach().log().flatten()[repeated]
    found = occupancy_penalty(scores, "sqrt_chi2", 0.4, 1e9, 0.0)
    shift = 0.4 / chi2.detach().sqrt()  # the official code's e^d - 1 in place of e^d
    assert_close(found, -gradient.flatten()[repeated] + shift, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["sqrt_chi2", "tv", "wasserstein"])
def test_orpo_discriminator_loss_rises_with_reference_scores_and_falls_with_current(kind: Any) -> None:
    current, reference = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = discriminator_loss(current.clamp(-2, 2), reference.clamp(-2, 2), kind)
    down, up = torch.autograd.grad(loss, (current, reference))
    inside = (current.abs() < 1.5) & (reference.abs() < 1.5)
    assert (down[inside] < 0).all() and (up[inside] > 0).all()


def test_orpo_trained_discriminator_is_the_log_occupancy_ratio() -> None:
    counts = torch.tensor([[50, 30, 20], [10, 30, 60]])
    current, reference = (torch.eye(3).repeat_interleave(c, 0) for c in counts)
    shapes, draw = perceptron_shapes(3, 0, 0), torch.Generator().manual_seed(0)
    weights = initial_weights(shapes, draw)
    found = Discriminator(weights, torch.zeros(4), torch.zeros(4), torch.zeros(()))
    for lr in (0.05, 0.002):
        found = train_discriminator(
            found, current, reference, shapes, draw, kind="sqrt_chi2", epochs=400, minibatch=100, lr=lr
        )
    scores = perceptron(found.weights, torch.eye(3), shapes)
    assert_close(scores, (counts[0] / counts[1]).log(), atol=0.1, rtol=0)


# Action distributions


def integrate(p: Any, q: Any, low: float, high: float) -> Tensor:
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)[1:-1]
    return torch.trapezoid((2 * p.log_prob(x) - q.log_prob(x)).exp(), x) - 1


def tensors(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor([row], dtype=torch.float64) for row in rows]


def test_orpo_gaussian_chi2_is_the_integral() -> None:
    one = integrate(Normal(0.3, 0.8), Normal(-0.1, 0.9), -12, 12)
    two = integrate(Normal(-1.0, 0.5), Normal(0.2, 1.1), -12, 12)
    found = gaussian_chi2(*tensors([0.3, -1.0], [0.8, 0.5], [-0.1, 0.2], [0.9, 1.1]))
    assert found.item() == pytest.approx(float((1 + one) * (1 + two) - 1), rel=1e-6)


def test_orpo_beta_chi2_is_the_integral() -> None:
    p = Beta(torch.tensor(3.0).double(), torch.tensor(2.5).double())
    q = Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
    found = beta_chi2(*tensors([3.0], [2.5], [2.0], [3.0]))
    assert found.item() == pytest.approx(float(integrate(p, q, 0, 1)), rel=1e-5)


def test_orpo_chi2_is_infinite_outside_its_domain() -> None:
    assert gaussian_chi2(*tensors([0.0, 0.0], [1.5, 1.0], [0.0, 0.0], [1.0, 1.0])) == torch.inf
    assert beta_chi2(*tensors([1.0], [2.0], [2.0], [1.0])) == torch.inf
    assert categorical_chi2(*tensors([0.5, 0.5, 0.0], [1.0, 0.0, 0.0])) == torch.inf
    assert categorical_chi2(*tensors([1.0, 0.0], [0.5, 0.5])).item() == pytest.approx(1.0)


def test_orpo_equal_distributions_have_no_divergence() -> None:
    p, mean, std = tensors([0.2, 0.8, 0.0], [0.1, -3.0], [0.4, 2.0])
    assert categorical_chi2(p, p).item() == 0 and categorical_kl(p, p).item() == 0
    assert gaussian_chi2(mean, std, mean, std).item() == pytest.approx(0, abs=1e-12)
    assert gaussian_kl(mean, std.log(), mean, std.log()).item() == pytest.approx(0, abs=1e-12)
    assert beta_chi2(std, std, std, std).item() == pytest.approx(0, abs=1e-12)


def test_orpo_action_penalty_pays_the_kl_where_chi2_is_infinite() -> None:
    kl, chi2 = torch.tensor([0.5, 0.2]), torch.tensor([torch.inf, 0.09])
    assert action_penalty(kl, chi2, "chi2", 2.0, 0.5).item() == pytest.approx(4 * (0.5 + 0.09) / 2)
    assert action_penalty(kl, chi2, "sqrt_chi2", 2.0, 0.5).item() == pytest.approx(4 * (0.5**0.5 + 0.3) / 2)
    assert action_penalty(kl, chi2, "kl", 2.0, 0.5).item() == pytest.approx(4 * 0.35)


# Decisions and responses, with expectations taken over all actions


def choices(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with gradient, and the log-probabilities of the reference and of a behaviour policy, over five actions."""
    draw = torch.Generator().manual_seed(seed)
    logits, reference, behaviour = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(3))
    return logits.requires_grad_(), reference.log_softmax(-1), behaviour.log_softmax(-1)


def one_decision_each(old_logp: Tensor, ref_logp: Tensor) -> Batch:
    rows = len(old_logp)
    batch = Batch(
        mask=torch.ones(rows, 1, dtype=torch.bool),
        old_logp=old_logp[:, None],
        rewards=torch.zeros(rows, 1, dtype=torch.float64),
        group=torch.zeros(rows, dtype=torch.int64),
        prompt_id=torch.zeros(rows, dtype=torch.int64),
        ref_logp=ref_logp[:, None],
        batch_size=[rows],
    )
    batch.weights = torch.ones_like(batch.old_logp)
    return batch


@pytest.mark.parametrize(("kind", "exact"), [("kl", categorical_kl), ("chi2", categorical_chi2)])
def test_orpo_sampled_action_divergence_has_the_exact_expectation_and_gradient(kind: Any, exact: Any) -> None:
    logits, reference, behaviour = choices()
    logp = logits.log_softmax(-1)
    terms = sampled_action_divergence(
        Evaluation(logp[:, None]), one_decision_each(behaviour, reference), kind
    )
    assert (terms >= 0).all()
    estimate = (behaviour.exp() * terms[:, 0]).sum()
    expected = exact(logp.exp(), reference.exp())
    assert_close(estimate, expected)
    assert_close(
        torch.autograd.grad(estimate, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    )


def test_orpo_official_sequence_gradient_is_half_of_chi2_plus_the_reverse_kl() -> None:
    logits, reference, _ = choices(1)
    logp = logits.log_softmax(-1)
    probabilities = logp.detach().exp()
    mask = torch.ones(5, 1, dtype=torch.bool)
    found = sequence_divergence(logp[:, None], reference[:, None], mask, weights=probabilities)
    chi2 = categorical_chi2(logp.exp(), reference.exp())
    assert_close(found.chi2, chi2)
    assert_close(found.kl, categorical_kl(logp.exp(), reference.exp()))
    reverse = categorical_kl(reference.exp(), logp.exp())
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found.chi2, chi2, reverse)]
    assert_close(grads[0], grads[1] / 2 + grads[2])


@pytest.mark.parametrize("kind", ["sqrt_chi2", "chi2", "kl"])
def test_orpo_sequence_reward_has_the_exact_gradient(kind: Any) -> None:
    logits, reference, _ = choices(2)
    logp = logits.log_softmax(-1)
    rows = torch.multinomial(logp.detach().exp(), 200_000, True, generator=torch.Generator().manual_seed(0))
    batch = one_decision_each(logp.detach()[rows], reference[rows])
    earned = SequenceChi2Reward(coef=0.5, kind=kind)(batch, draws(0)).step_rewards[:, 0]
    surrogate = (earned - earned.mean()) * logp[rows]
    (found,) = torch.autograd.grad(surrogate.mean(), logits, retain_graph=True)
    chi2, kl = categorical_chi2(logp.exp(), reference.exp()), categorical_kl(logp.exp(), reference.exp())
    (expected,) = torch.autograd.grad(-0.5 * sampled_penalty(kl, chi2, kind), logits)
    assert_close(found, expected, rtol=0.05, atol=0.005)


def test_orpo_sequence_regularizer_is_silent_at_the_reference() -> None:
    batch = random_batch(frozenset({"ref_logp"}))
    batch.weights = batch.mask.double()
    leaf = torch.where(batch.mask, batch.ref_logp, 0.0).requires_grad_()
    loss = SequenceChi2(coef=1.0)(Evaluation(leaf).where(batch.mask), batch)
    assert loss.item() == pytest.approx(1e-2)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert not gradient.any()


# The occupancy part


def recorded(path: Path, seed: int = 3) -> str:
    """A rollout of the reference, as a file."""
    batch = random_batch(frozenset({"ref_features"}), seed=seed)
    save_file({name: tensor.contiguous() for name, tensor in batch.to_tensors().items()}, path)
    return str(path)


def test_orpo_occupancy_without_coefficient_is_plain_ppo(tmp_path: Path) -> None:
    part = OccupancyPenalty(coef=0.0, reference=recorded(tmp_path / "reference.safetensors"), **OPTIONS)
    batch = random_batch(part.requires | {"old_value"}, rewards="graded")
    plain = recipe("orpo-chi2", "control", shaping=[]).prepare(batch, draws(0))
    found = recipe("orpo-chi2", "control", shaping=[part]).prepare(batch, draws(0))
    assert torch.equal(found.advantages, plain.advantages)


def test_orpo_scale_free_penalty_scales_with_the_proxy(tmp_path: Path) -> None:
    penalties = []
    for scale in (1.0, 10.0):
        batch = random_batch(frozenset({"ref_features"}), seed=3, rewards="graded")
        batch.rewards = scale * batch.rewards
        path = tmp_path / f"{scale}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in batch.to_tensors().items()}, path)
        current = random_batch(frozenset({"ref_features"}), seed=4)
        penalties.append(OccupancyPenalty(reference=str(path), **OPTIONS)(current, draws(0)).step_rewards)
    assert penalties[0].any()
    assert_close(penalties[1], 10 * penalties[0])


def test_orpo_first_iteration_is_the_reference_and_the_second_is_penalised() -> None:
    part = OccupancyPenalty(**OPTIONS)
    first, second = (random_batch(part.requires, seed=seed) for seed in (0, 1))
    assert not part(first, draws(0)).step_rewards.any()
    assert not len(part.reference)
    part.observe(first)
    assert_close(part.reference, first.signal("ref_features")[first.mask].float())
    assert part(second, draws(0, 1)).step_rewards.any()


def test_orpo_steps_unlike_the_reference_are_penalised_and_others_rewarded() -> None:
    part = OccupancyPenalty(features="old_features", coef=1.0, scale_free=False, **OPTIONS)
    batch = random_batch(part.requires, groups=(40,))
    part.observe(part(batch, draws(0)))
    moved = batch.clone()
    away = torch.arange(len(batch)) < 10
    moved.set_signal("old_features", torch.where(away[:, None, None], 5.0, batch.signal("old_features")))
    earned = part(moved, draws(0, 1)).step_rewards
    assert (earned[away][batch.mask[away]] < 0).all()
    assert earned[~away][batch.mask[~away]].mean() > 0


def test_orpo_capacity_bounds_what_is_kept() -> None:
    part = OccupancyPenalty(capacity=7, **OPTIONS)
    batch = random_batch(part.requires)
    part(batch, draws(0))
    part.observe(batch)
    assert len(part.reference) == 7


def test_orpo_wrong_reference_is_refused(tmp_path: Path) -> None:
    batch = random_batch(frozenset({"ref_features", "old_features"}))
    with pytest.raises(ConfigError, match="no such file"):
        OccupancyPenalty(reference=str(tmp_path / "absent"))(batch, draws(0))
    narrow = batch.clone()
    narrow.set_signal("ref_features", batch.signal("ref_features")[..., :2])
    path = tmp_path / "narrow.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in narrow.to_tensors().items()}, path)
    with pytest.raises(ConfigError, match="2 features"):
        OccupancyPenalty(reference=str(path))(batch, draws(0))


def test_orpo_resumed_run_continues_bit_for_bit() -> None:
    def trainer() -> Trainer:
        task = SumModTask(train_size=12)
        config = TrainerConfig(prompts=6, rollouts=4, lr=0.01, epochs=1, minibatches=2, iterations=5)
        shaping = [OccupancyPenalty(**OPTIONS)]
        return Trainer(SumModActor(task), task, recipe("orpo-chi2", "control", shaping=shaping), config)

    whole, resumed = trainer(), trainer()
    for _ in range(3):
        whole.iterate()
    resumed.load_state_dict(deepcopy(whole.state_dict()))
    for _ in range(2):
        assert whole.iterate()[0]["loss"] == resumed.iterate()[0]["loss"]
    assert whole.method.state_dict()["shaping.0.steps"] > 0
    for one, other in zip(whole.actor.module.parameters(), resumed.actor.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["sqrt_chi2", "tv", "wasserstein"])
def test_orpo_occupancy_part_passes_the_battery(kind: Any, tmp_path: Path) -> None:
    path = recorded(tmp_path / "reference.safetensors")
    part = OccupancyPenalty(kind=kind, reference=path, scale_free=False, **OPTIONS)
    check_method(recipe("orpo-chi2", "control", shaping=[part]))


@pytest.mark.parametrize("part", [ActionDivergence(kind="chi2"), SequenceChi2(kind="kl"), ActionSqrtChi2()])
def test_orpo_regularizers_pass_the_battery(part: Any) -> None:
    check_method(part)
