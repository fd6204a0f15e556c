"""Identities of the (N)-HARPG card (arXiv 2302.01734), and HARPG in the trainer."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import polopt
from polopt.batch import Evaluation
from polopt.engine.hessian import evaluation_product
from polopt.engine.step import SecondRollout
from polopt.errors import ConfigError
from polopt.methods.gradient.gradient_average import joint_norm
from polopt.methods.gradient.harpg import HARPG, corrected
from polopt.methods.gradient.n_pg_igt import (
    NormalizedMomentum,
    VanillaPolicyGradient,
    score_objective,
    step_weights,
)
from polopt.miniature import SumModActor, SumModTask
from polopt.testing import check_method
from tests.methods.gradient.recorder import Recorder

A = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
B = torch.tensor([1.0, -0.4], dtype=torch.float64)


def gradient(x: Tensor, c: float) -> Tensor:
    return B - A @ x - c * x**3


def hessian(x: Tensor, v: Tensor, c: float) -> Tensor:
    return -A @ v - 3 * c * x**2 * v


def ascend(
    part: HARPG, c: float, steps: int = 8, scale: float = 1.0, second: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """Of each iteration the parameters and the average; `second` falsifies the Hessian."""
    x = nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64))
    optimizer, draws, found = part.build([x], 0.2), torch.Generator().manual_seed(0), []

    def product(direction: Sequence[Tensor]) -> list[Tensor]:
        return [-scale * second * hessian(x.detach(), direction[0], c)]

    for _ in range(steps):
        before = x.detach().clone()
        x.grad = -scale * gradient(x.detach(), c)
        part.correct_gradient(optimizer, product, lambda _: draws)
        assert torch.equal(x, before)
        optimizer.step()
        found.append((before, optimizer.state[x]["average"].clone()))
    return found


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("eta", "power"), [(1.0, 1.0), (0.4, 0.5), (0.2, 0.0)])
def test_i1_with_the_exact_hessian_of_a_quadratic_the_average_is_the_gradient(
    normalized: bool, eta: float, power: float
) -> None:
    for x, average in ascend(HARPG(normalized=normalized, eta=eta, eta_power=power), 0.0):
        assert_close(average, gradient(x, 0.0), rtol=1e-9, atol=1e-12)


def test_i2_with_eta_1_it_is_the_vanilla_gradient_and_no_second_rollout_is_made() -> None:
    x, y = (nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64)) for _ in range(2))
    part = HARPG(eta_power=0.0)
    ours, vanilla = part.build([x], 0.2), VanillaPolicyGradient(step_power=0.5).build([y], 0.2)

    def refuse(_: Any) -> Any:
        raise AssertionError("a second rollout")

    for _ in range(5):
        x.grad, y.grad = -gradient(x.detach(), 0.4), -gradient(y.detach(), 0.4)
        part.correct_gradient(ours, refuse, refuse)
        ours.step()
        vanilla.step()
        assert torch.equal(x, y)


def test_i3_without_correction_it_is_normalized_momentum() -> None:
    x, y = (nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64)) for _ in range(2))
    ours = HARPG(normalized=True, eta_power=2 / 3).build([x], 0.2)
    momentum = NormalizedMomentum().build([y], 0.2)
    for _ in range(5):
        x.grad, y.grad = -gradient(x.detach(), 0.4), -gradient(y.detach(), 0.4)
        ours.step()
        momentum.step()
        assert torch.equal(x, y)


STATES, ACTIONS, HORIZON, GAMMA = 2, 2, 3, 0.9


def all_trajectories() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, actions and rewards of every trajectory of a small MDP, and the dynamics' share of its probability."""
    draws = torch.Generator().manual_seed(3)
    move = torch.rand(STATES, ACTIONS, STATES, generator=draws, dtype=torch.float64)
    move = move / move.sum(-1, keepdim=True)
    reward = torch.randn(STATES, ACTIONS, generator=draws, dtype=torch.float64)
    start = torch.tensor([0.3, 0.7], dtype=torch.float64)
    every = list(itertools.product(range(STATES), repeat=HORIZON))
    actions = list(itertools.product(range(ACTIONS), repeat=HORIZON))
    pairs = list(itertools.product(every, actions))
    s, a = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    return s, a, reward[s, a], start[s[:, 0]] * move[s[:, :-1], a[:, :-1], s[:, 1:]].prod(-1)


def test_i4_over_all_trajectories_the_estimates_are_gradient_and_hessian() -> None:
    s, a, rewards, dynamics = all_trajectories()
    mask = torch.ones(s.shape, dtype=torch.bool)
    theta = torch.randn(STATES, ACTIONS, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(STATES, ACTIONS, dtype=torch.float64)

    def logp(theta: Tensor) -> Tensor:
        return theta.log_softmax(-1)[s, a]

    def objective(theta: Tensor) -> Tensor:
        probability = dynamics * logp(theta).sum(-1).exp()
        return (probability * (rewards * GAMMA ** torch.arange(HORIZON).double()).sum(-1)).sum()

    exact = torch.autograd.functional.jacobian(objective, theta)
    curved = torch.autograd.functional.hvp(objective, theta, direction)[1]
    evaluated, weights = logp(theta), step_weights(rewards, mask, GAMMA)
    probability = (dynamics * evaluated.sum(-1).exp()).detach()
    assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
    phi = (probability * score_objective(evaluated, weights, mask)).sum()
    (found,) = torch.autograd.grad(phi, theta, retain_graph=True)
    assert_close(found, exact, rtol=1e-12, atol=1e-14)
    share = {"logp": probability[:, None] * weights}
    (product,) = evaluation_product(Evaluation(evaluated), share, mask, [theta], [direction])
    assert_close(product, curved, rtol=1e-12, atol=1e-14)


def test_products_are_averaged_per_trajectory_not_multiplied_as_means() -> None:
    s, a, rewards, _ = (t[:5] for t in all_trajectories())
    mask = torch.ones(s.shape, dtype=torch.bool)
    theta = torch.randn(STATES, ACTIONS, dtype=torch.float64, requires_grad=True)
    v = torch.randn(STATES, ACTIONS, dtype=torch.float64)
    weights = step_weights(rewards, mask, GAMMA)
    rows = []
    for i in range(5):

        def of_row(theta: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
            logp = theta.log_softmax(-1)[s[i], a[i]]
            return (weights[i] * logp).sum(), logp.sum()

        g, score = torch.autograd.functional.jacobian(of_row, theta)
        second = torch.autograd.functional.hvp(lambda t: of_row(t)[0], theta, v)[1]
        rows.append(g * (score * v).sum() + second)
    evaluation = Evaluation(theta.log_softmax(-1)[s, a])
    (found,) = evaluation_product(evaluation, {"logp": weights / 5}, mask, [theta], [v])
    assert_close(found, torch.stack(rows).mean(0))


@pytest.mark.parametrize("scale", [1e-9, 3.0, 1e9])
def test_i5_n_harpg_does_not_see_the_scale_of_the_rewards(scale: float) -> None:
    plain, scaled = (ascend(HARPG(normalized=True), 0.4, scale=c) for c in (1.0, scale))
    for (x, _), (y, _) in zip(plain, scaled, strict=True):
        assert_close(x, y, rtol=1e-10, atol=1e-12)
    for t in range(7):
        assert (plain[t + 1][0] - plain[t][0]).norm().item() == pytest.approx(0.2 * 2 / (t + 2))


def test_i5_harpg_sees_the_scale_of_the_rewards() -> None:
    assert not torch.allclose(ascend(HARPG(), 0.4)[-1][0], ascend(HARPG(), 0.4, scale=3.0)[-1][0])


def test_i6_over_q_the_expected_average_is_the_gradient() -> None:
    part, c = HARPG(), 0.4
    expected = there = torch.zeros(2, dtype=torch.float64)
    for side in (-1, 1):
        q = 0.5 + side / (2 * 3**0.5)  # Gauss' nodes, exact for the Hessian of a quartic
        x = nn.Parameter(torch.tensor([1.2, -0.7], dtype=torch.float64))
        optimizer = part.build([x], 0.2)
        x.grad = -gradient(x.detach(), c)
        optimizer.step()
        x.grad = -gradient(x.detach(), c)
        part.correct_at(q, optimizer, lambda v, x=x: [-hessian(x.detach(), v[0], c)])
        optimizer.step()
        expected = expected + 0.5 * optimizer.state[x]["average"]
        there = optimizer.state[x]["previous"]
    assert_close(expected, gradient(there, c), rtol=1e-10, atol=1e-12)


def test_i7_no_rewards_or_a_single_action_have_product_0() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    for width, weights in ((3, torch.zeros(2, 2)), (1, torch.ones(2, 2))):
        theta = torch.randn(2, 2, width, requires_grad=True)
        evaluation = Evaluation(theta.log_softmax(-1)[..., 0]).where(mask)
        (found,) = evaluation_product(evaluation, {"logp": weights}, mask, [theta], [torch.ones_like(theta)])
        assert not found.any()


def test_the_correction_is_averaged_as_the_equation_says() -> None:
    g, v, d = torch.randn(3, 7, dtype=torch.float64)
    eta = 0.3
    assert_close((1 - eta) * d + eta * corrected(g, v, eta), (1 - eta) * (d + v) + eta * g)


def trainer(optimizer: str, method: str = "n-pg-igt", **sizes: Any) -> polopt.Trainer:
    task = SumModTask(train_size=12)
    config = polopt.TrainerConfig(**{"iterations": 5, "prompts": 6, "rollouts": 4, "lr": 0.3} | sizes)
    return polopt.Trainer(Recorder(task), task, polopt.recipe(method, optimizer=optimizer), config)


@pytest.mark.parametrize("normalized", ["false", "true"])
def test_the_second_rollout_is_at_a_random_point_of_the_last_segment(normalized: str) -> None:
    run = trainer(f"harpg:normalized={normalized}")
    actor: Any = run.actor
    points, shares = [actor.flat()], []
    for t in range(5):
        actor.rolled.clear()
        actor.drawn.clear()
        run.iterate()
        assert torch.equal(actor.rolled[0], points[-1])
        assert len(actor.rolled) == (2 if t else 1)
        if t:
            step = points[-1] - points[-2]
            q = float((actor.rolled[1] - points[-2]) @ step / (step @ step))
            assert_close(actor.rolled[1], q * points[-1] + (1 - q) * points[-2])
            assert not torch.equal(*actor.drawn)
            shares.append(q)
        points.append(actor.flat())
    assert all(0 <= q <= 1 for q in shares) and len(set(shares)) == 4


def test_the_gradient_of_the_first_rollout_is_left_in_place_by_the_second() -> None:
    run = trainer("harpg")
    run.iterate()
    held: list[Tensor] = []
    hessian_product = run.stepper._hessian_product

    def product(second_rollout: SecondRollout, direction: Sequence[Tensor]) -> list[Tensor]:
        trained = [p.grad for p in run.parameters if p.grad is not None]
        before = [grad.clone() for grad in trained]
        found = hessian_product(second_rollout, direction)
        now = [p.grad for p in run.parameters if p.grad is not None]
        assert all(map(torch.equal, before, now)) and len(before) == len(now)
        held.extend(found)
        return found

    run.stepper._hessian_product = product
    run.iterate()
    assert joint_norm(held) > 0


@pytest.mark.parametrize("method", ["copg", "ppo"])
def test_losses_that_are_no_sums_of_log_probabilities_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="optimizer harpg: needs"):
        trainer("harpg", method, minibatches=1, epochs=1)


@pytest.mark.parametrize("method", ["grpo", "reinforce", "mhpo", "dapo"])
def test_other_methods_run_with_it(method: str) -> None:
    run = trainer("harpg:normalized=true", method, minibatches=1, epochs=1)
    metrics = [run.iterate()[0] for _ in range(3)]
    assert all(p.isfinite().all() for p in run.parameters)
    assert sum(m["updates"] for m in metrics) == 3


def test_it_learns() -> None:
    task = SumModTask(train_size=12, modulus=4, length=2)
    config = polopt.TrainerConfig(iterations=60, prompts=12, rollouts=8, lr=1.0)
    run = polopt.Trainer(SumModActor(task, width=16), task, polopt.recipe("n-harpg"), config)
    rewards = [float(run.iterate()[0]["reward/sum"]) for _ in range(60)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1.5


@pytest.mark.parametrize("recipe", ["harpg", "n-harpg"])
def test_the_recipes_pass_the_battery(recipe: str) -> None:
    check_method(recipe)
