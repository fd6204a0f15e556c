"""Identities of the N-PG-IGT card (arXiv 2302.01734), and N-PG-IGT in the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import polopt
from polopt.batch import Batch
from polopt.engine.run_folder import read_metrics
from polopt.errors import ConfigError
from polopt.methods.gradient.gradient_average import GradientAverage, joint_norm
from polopt.methods.gradient.n_pg_igt import (
    NPGIGT,
    AveragedAscent,
    DiscountedToGo,
    NormalizedMomentum,
    VanillaPolicyGradient,
    score_objective,
    step_weights,
)
from polopt.miniature import SumModTask
from polopt.testing import check_method
from tests.methods.gradient.recorder import Recorder

A = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
B = torch.tensor([1.0, -0.4], dtype=torch.float64)
Gradient = Callable[[Tensor], Tensor]


def affine(x: Tensor) -> Tensor:
    return B - A @ x


def cubic(x: Tensor) -> Tensor:
    return affine(x) - 0.4 * x**3


def ascend(
    part: AveragedAscent, gradient: Gradient, steps: int = 8, lr: float = 0.3
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each iteration the parameters, where the gradient was taken, and the average."""
    x = nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64))
    optimizer = part.build([x], lr)
    found = []
    for _ in range(steps):
        before = x.detach().clone()
        with part.at_rollout(optimizer):
            there = x.detach().clone()
            x.grad = -gradient(there)
        assert torch.equal(x, before)
        optimizer.step()
        found.append((before, there, optimizer.state[x]["average"].clone()))
    return [*found, (x.detach().clone(), x.detach().clone(), x.detach().clone())]


@pytest.mark.parametrize(("eta", "power"), [(1.0, 0.8), (1.0, 1.5), (0.3, 0.5), (3.0, 0.8), (0.7, 0.0)])
def test_i1_transport_is_exact_for_affine_gradients(eta: float, power: float) -> None:
    for x, _, average in ascend(NPGIGT(eta=eta, eta_power=power), affine)[:-1]:
        assert_close(average, affine(x), rtol=1e-9, atol=1e-12)


def test_i1_without_look_ahead_the_average_lags() -> None:
    x, _, average = ascend(NormalizedMomentum(), affine)[-2]
    assert (average - affine(x)).norm() > 1e-2


def test_i2_with_eta_1_it_is_the_normalized_vanilla_gradient() -> None:
    ours = ascend(NPGIGT(eta_power=0.0), cubic)
    vanilla = ascend(VanillaPolicyGradient(normalized=True, step_power=1.0), cubic)
    for (x, there, average), (y, _, _) in zip(ours[:-1], vanilla, strict=False):
        assert torch.equal(x, y) and torch.equal(x, there)
        assert torch.equal(average, cubic(x))
    assert torch.equal(ours[-1][0], vanilla[-1][0])


def test_i3_without_look_ahead_it_is_normalized_momentum() -> None:
    x = torch.tensor([0.5, 0.8], dtype=torch.float64)
    average = torch.zeros(2, dtype=torch.float64)
    for t, (found, there, _) in enumerate(ascend(NormalizedMomentum(), cubic)):
        assert torch.equal(found, there)
        assert_close(found, x)
        eta = (2 / (t + 2)) ** (2 / 3)
        average = cubic(x) if t == 0 else (1 - eta) * average + eta * cubic(x)
        x = x + 0.3 * 2 / (t + 2) * average / average.norm()


def test_vanilla_steps_are_the_gradient_times_the_schedule() -> None:
    found = ascend(VanillaPolicyGradient(), cubic)
    for t in range(8):
        step = 0.3 * (2 / (t + 2)) ** (2 / 3)
        assert_close(found[t + 1][0], found[t][0] + step * cubic(found[t][0]))


def test_i5_each_step_has_the_length_gamma() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))]
    optimizer = NPGIGT().build(parameters, 0.3)
    for t in range(6):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert joint_norm(optimizer.last_step()) == pytest.approx(0.3 * 2 / (t + 2), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 0.5, 1e12])
def test_i5_the_scale_of_the_rewards_does_not_matter(scale: float) -> None:
    for one, other in zip(ascend(NPGIGT(), cubic), ascend(NPGIGT(), lambda x: scale * cubic(x)), strict=True):
        assert_close(one[0], other[0], rtol=1e-12, atol=1e-12)


def test_i7_without_any_gradient_nothing_moves() -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer = NPGIGT().build([x], 0.3)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(x, torch.ones(3))
    assert optimizer.param_groups[0]["updates"] == 3


def test_i7_no_rewards_or_a_single_action_have_gradient_0() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    one = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, torch.nan, torch.inf]], dtype=torch.float64)
    silent = step_weights(torch.zeros(2, 3, dtype=torch.float64), mask, 0.9)
    (none,) = torch.autograd.grad(score_objective(logits.log_softmax(-1)[..., 0], silent, mask).sum(), logits)
    (constant,) = torch.autograd.grad(
        score_objective(one.log_softmax(-1)[..., 0], step_weights(rewards, mask, 0.9), mask).sum(), one
    )
    assert not none.any() and not constant.any()


def test_weights_are_discounted_by_absolute_time_and_skip_what_is_masked() -> None:
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    rewards = torch.tensor([[1.0, torch.nan, 2.0, 3.0], [4.0, 5.0, torch.inf, 9.0]], dtype=torch.float64)
    expected = [[1 + 2 * 0.25 + 3 * 0.125, 0, 0.5 + 0.375, 0.375], [4 + 2.5, 2.5, 0, 0]]
    found = step_weights(rewards, mask, 0.5)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert_close(step_weights(rewards, mask, 0.0)[:, 0], torch.tensor([1.0, 4.0], dtype=torch.float64))


def returns_that_are_a_cubic_of_time(steps: int) -> Batch:
    time = torch.arange(steps + 1, dtype=torch.float64) / 100
    value = 2 - time + 30 * time**2 - 400 * time**3
    return Batch(
        mask=torch.ones(4, steps, dtype=torch.bool),
        old_logp=torch.zeros(4, steps, dtype=torch.float64),
        rewards=value[steps - 1].expand(4)[:, None].clone(),
        step_rewards=torch.cat([value[:-2] - 0.9 * value[1:-1], value.new_zeros(1)]).expand(4, -1).clone(),
        group=torch.zeros(4, dtype=torch.int64),
        prompt_id=torch.zeros(4, dtype=torch.int64),
        batch_size=[4],
    )


def test_the_baseline_is_fitted_to_the_iteration_before() -> None:
    batch = returns_that_are_a_cubic_of_time(60)
    part = DiscountedToGo(gamma=0.9, baseline="time")
    plain = DiscountedToGo(gamma=0.9)(batch)
    assert_close(part(batch), plain)
    part.observe(batch)
    assert part(batch).abs().max() < 0.01 * plain.abs().max()


def trainer(optimizer: str, out: Path | None = None, **sizes: Any) -> polopt.Trainer:
    task = SumModTask(train_size=12)
    config = polopt.TrainerConfig(**{"iterations": 5, "prompts": 6, "rollouts": 4, "lr": 0.3} | sizes)
    return polopt.Trainer(
        Recorder(task), task, polopt.recipe("n-pg-igt", optimizer=optimizer), config, out=out
    )


def test_rollout_and_gradient_are_at_the_look_ahead_and_all_else_where_the_parameters_are() -> None:
    run = trainer("n-pg-igt")
    actor: Any = run.actor
    points = [actor.flat()]
    for t in range(4):
        actor.rolled.clear()
        actor.evaluated.clear()
        run.iterate()
        eta = min(1.0, (2 / (t + 2)) ** 0.8)
        back = points[-1] - points[-2] if t else torch.zeros_like(points[0])
        expected = points[-1] + (1 - eta) / eta * back
        assert t == 0 or (1 - eta) / eta * back.norm() > 0.01
        for found in (*actor.rolled, *actor.evaluated):
            assert_close(found, expected)
        assert actor.rolled and actor.evaluated
        points.append(actor.flat())
        assert (points[-1] - points[-2]).norm() == pytest.approx(0.3 * 2 / (t + 2), rel=1e-9)
        actor.rolled.clear()
        run.score()
        assert torch.equal(actor.rolled[0], points[-1])
        state = run.state_dict()["model"]
        assert torch.equal(
            torch.cat([state[n].flatten() for n, _ in actor.module.named_parameters()]), points[-1]
        )


def test_the_average_is_of_gradients_that_are_not_clipped() -> None:
    found = []
    for norm in (1e-9, 1e9):
        run = trainer("n-pg-igt", max_grad_norm=norm)
        for _ in range(3):
            run.iterate()
        found.append(run.optimizer.state[run.parameters[0]]["average"])
    assert torch.equal(*found) and found[0].norm() > 1e-3


def test_an_iteration_in_which_nothing_teaches_goes_on_along_the_average() -> None:
    run = trainer("n-pg-igt")
    actor: Any = run.actor
    run.iterate()
    average = [run.optimizer.state[p]["average"].clone() for p in run.parameters]
    run.task.rewards = lambda tokens, *_: torch.zeros(len(tokens), 1, dtype=torch.float64)  # type: ignore[attr-defined]
    before = actor.flat()
    assert run.iterate()[0]["updates"] == 1
    assert (actor.flat() - before).norm() == pytest.approx(0.3 * 2 / 3, rel=1e-9)
    eta = (2 / 3) ** 0.8
    for p, d in zip(run.parameters, average, strict=True):
        assert_close(run.optimizer.state[p]["average"], (1 - eta) * d)


@pytest.mark.parametrize("sizes", [{"minibatches": 2}, {"epochs": 2}, {"replay": 2}])
@pytest.mark.parametrize("optimizer", ["n-pg-igt", "nsgdm", "vanilla-pg", "harpg"])
def test_more_than_one_update_per_rollout_is_refused(optimizer: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"optimizer {optimizer}: needs .* one step per rollout$"):
        trainer(optimizer, **sizes)


@pytest.mark.parametrize("optimizer", ["n-pg-igt", "nsgdm", "vanilla-pg", "harpg", "harpg:normalized=true"])
def test_a_run_that_was_interrupted_continues_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    whole = trainer(optimizer, tmp_path / "whole", iterations=6, checkpoint_every=2)
    whole.run()
    trainer(optimizer, tmp_path / "parts", iterations=3, checkpoint_every=2).run()
    second = trainer(optimizer, tmp_path / "parts", iterations=6, checkpoint_every=2)
    second.run(resume=True)
    for one, other in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
        for name in ("average", "previous"):
            assert torch.equal(whole.optimizer.state[one][name], second.optimizer.state[other][name])
    assert len(read_metrics(tmp_path / "parts")) == len(read_metrics(tmp_path / "whole"))


@pytest.mark.parametrize("optimizer", ["n-pg-igt", "harpg"])
def test_averaged_gradients_keep_little_state(optimizer: str) -> None:
    run = trainer(optimizer)
    run.iterate()
    state = run.optimizer.state_dict()
    assert all(set(values) == {"average", "previous"} for values in state["state"].values())
    assert isinstance(run.optimizer, GradientAverage) and state["param_groups"][0]["updates"] == 1


def test_it_learns() -> None:
    run = trainer("n-pg-igt", prompts=12, rollouts=8, lr=1.0)
    before = sum(float(run.iterate()[0]["reward/sum"]) for _ in range(3))
    for _ in range(60):
        run.iterate()
    assert sum(float(run.iterate()[0]["reward/sum"]) for _ in range(3)) > before + 0.3


@pytest.mark.parametrize("part", [VanillaPolicyGradient(), DiscountedToGo(baseline="time")])
def test_the_parts_pass_the_battery(part: Any) -> None:
    check_method(part)


def test_the_recipe_passes_the_battery() -> None:
    check_method("n-pg-igt")
