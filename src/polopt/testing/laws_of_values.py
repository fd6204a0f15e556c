"""Laws about numbers: finite at the extremes, exact statistics, right derivatives in any precision."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from polopt.batch import ABSENT, Batch
from polopt.engine.gradient import DIFFERENTIABLE
from polopt.testing import compare
from polopt.testing.compare import Frozen, expect
from polopt.testing.laws import law
from polopt.testing.subject import Step, Subject, draws, prepared


@law()
def results_are_finite(subject: Subject) -> None:
    """Advantages, weights, loss and gradient are finite, weights are not negative, and something is learned."""
    learned = 0.0
    for seed, groups in enumerate([(4, 1, 3, 5), (4, 4, 4, 4), (1, 2, 3, 4, 5, 6), (8, 8)]):
        method = subject.fresh()
        step = subject.step(method, subject.raw(method, seed=seed, groups=groups))
        compare.finite(step.tensors(), step.batch.mask)
        for name in ("advantages", "weights", "loss_weight"):
            shape = tuple(getattr(step.batch, name).shape)
            expect(shape == tuple(step.batch.mask.shape), f"{name} has the shape {shape}, not [N, T]")
        expect(bool((step.batch.weights >= 0).all()), "a weight is negative")
        expect(step.loss.shape == (), f"the loss has the shape {tuple(step.loss.shape)}")
        learned += sum(float(g.abs().sum()) for g in step.gradient.values())
        clipped = method.surrogate.clipped(step.evaluation.where(step.batch.mask), step.batch)
        right = clipped is None or (clipped.dtype == torch.bool and clipped.shape == step.batch.mask.shape)
        expect(right, "surrogate.clipped is not [N, T] of booleans")
    expect(learned > 0, "the gradient is zero on ordinary data")


@law()
def declared_signals_are_provided(subject: Subject) -> None:
    """Each part's `signals` are those it declares in `provides`, one row per trajectory."""
    method = subject.fresh()
    batch = prepared(method, subject.raw(method))
    for part in method.parts:
        found = part.signals(batch)
        expect(
            set(found) <= part.provides, f"{part.name} gives {sorted(set(found) - part.provides)} undeclared"
        )
    missing = sorted(name for name in method.provides if not batch.has(name))
    expect(not missing, f"{missing} declared and not there")


@law()
def extreme_ratios_stay_finite(subject: Subject) -> None:
    """Policies that are worlds apart, or certain, give finite losses, gradients and states in float32."""
    for field in ("old_logp", "ref_logp"):
        for shift in (60.0, -60.0, 1e4, -1e4):
            batch = compare.cast(subject.raw(), torch.float32)
            if getattr(batch, field) is not None:
                setattr(batch, field, getattr(batch, field) + shift)
                _finite_iteration(subject, batch, f"{field} {shift:+g} nats:")
    batch = compare.cast(subject.raw(), torch.float32)
    batch.old_logp = torch.zeros_like(batch.old_logp)
    _finite_iteration(subject, batch, "old_logp 0:")


@law(unusual=True)
def extreme_rewards_stay_finite(subject: Subject) -> None:
    """Rewards from 1e-30 to 1e15 give finite losses, gradients and states in float32."""
    for scale in (1e-30, 1e8, -1e15):
        batch = compare.cast(subject.raw(rewards="graded"), torch.float32)
        batch.rewards = batch.rewards * scale
        _finite_iteration(subject, batch, f"rewards of {scale}:")


@law(unusual=True)
def missing_rewards_are_defined(subject: Subject) -> None:
    """Rewards that are NaN or infinite count as missing; a trajectory without any is dropped; all dropped is defined."""
    bad = (torch.nan, torch.inf, -torch.inf, 1e300)
    for columns in (1, 3):
        batch = compare.cast(subject.raw(columns=columns), torch.float32)
        for row, value in enumerate(bad):
            batch.rewards[row] = value
            batch.rewards[row + 4, -1] = value
        step = _finite_iteration(subject, batch, f"{columns} rewards:")
        if batch.step_rewards is None:
            expect(set(step.batch.payload["row"].tolist()) & set(range(len(bad))) == set(), "not dropped:")
    batch = subject.raw()
    batch.rewards = torch.full_like(batch.rewards, torch.nan)
    batch.step_rewards = ABSENT
    method = subject.fresh()
    rest = prepared(method, batch)
    expect(len(rest) == 0, "trajectories without any reward are not dropped")
    start = compare.state_of(method)
    for part in method.parts:
        part.observe(rest)
    compare.finite_state(method, start, "no trajectory left:")


@law(unusual=True)
def odd_groups_are_defined(subject: Subject) -> None:
    """Groups of one, equal rewards, 7 equal and 1 different, trajectories without decisions give finite results."""
    _finite_iteration(subject, subject.raw(groups=[1]), "one trajectory:")
    _finite_iteration(subject, subject.raw(groups=[1] * 6), "groups of one:")
    for value in (0.0, 1.0, 0.1):
        batch = subject.raw()
        batch.rewards = torch.full_like(batch.rewards, value)
        _finite_iteration(subject, batch, f"all rewards {value}:")
    batch = subject.raw(groups=[8])
    batch.rewards = torch.full_like(batch.rewards, 0.1)
    batch.rewards[3] = 0.3
    _finite_iteration(subject, batch, "7 equal and 1 different:")
    for kept in (0, 1):
        batch = subject.raw()
        batch.mask = batch.mask & (torch.arange(len(batch)) < kept)[:, None]
        _finite_iteration(subject, batch, f"all but {kept} trajectories without decisions:")


@law(unusual=True)
def group_statistics_are_exact(subject: Subject) -> None:
    """Advantages that ignore a common shift do so at 2^27 too; those that are 0 for equal rewards are exactly 0."""
    method = subject.fresh()
    batch = subject.raw(method, groups=[8, 3, 1, 5], rewards="graded")
    batch.rewards[batch.group == 0] = 0.25
    batch.rewards[(batch.group == 0).nonzero()[2]] = 0.5

    def advantages(rewards: Tensor) -> Tensor:
        shifted = batch.clone()
        shifted.rewards = rewards
        return subject.fresh().prepare(shifted, draws(0)).advantages

    plain = advantages(batch.rewards)
    for shift in (1.0, 2.0**27):
        moved = advantages(batch.rewards + shift)
        if shift == 1.0 and not torch.allclose(moved, plain, rtol=1e-6, atol=1e-9):
            break
        error = float((moved - plain).abs().max())
        expect(error <= 1e-5 * max(1.0, float(plain.abs().max())), f"shift of {shift}: off by {error:.2g}")
    if not bool(advantages(torch.ones_like(batch.rewards)).any()):
        for value in (0.1, 0.7, 1 / 3):
            found = advantages(torch.full_like(batch.rewards, value))
            expect(
                not bool(found.any()), f"all rewards {value}: advantages up to {float(found.abs().max()):.2g}"
            )


@law()
def gradient_is_the_derivative(subject: Subject) -> None:
    """The gradient agrees with finite differences in float64, what is detached held constant (`gradcheck`)."""
    problems: list[str] = []
    for seed in range(3):
        method = subject.fresh()
        batch = prepared(method, subject.raw(method, seed=seed, groups=(3, 1, 2), steps=4))
        evaluation = subject.evaluate(method, batch).where(batch.mask)
        names = [name for name in DIFFERENTIABLE if name in evaluation.tensors()]

        def objective(*values: Tensor) -> Tensor:
            changed = replace(evaluation, **dict(zip(names, values, strict=True)))  # noqa: B023
            with frozen.replay():  # noqa: B023
                return method.objective(changed, batch)  # noqa: B023

        inputs = [evaluation.tensors()[name].clone().requires_grad_() for name in names]
        frozen = Frozen()
        with frozen.record():
            method.objective(replace(evaluation, **dict(zip(names, inputs, strict=True))), batch)
        if not objective(*inputs).requires_grad:
            return
        try:
            gradcheck(objective, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)
        except GradcheckError as error:
            problems.append(str(error).split("\n", 1)[0])
        else:
            return  # a kink within 1e-6 of one draw is no fault
    raise AssertionError(problems[0])


@law()
def precision_does_not_matter(subject: Subject) -> None:
    """On values that they can hold, float32 and bfloat16 give the gradient of float64 to 1e-4 and 5e-2."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        errors: list[float] = []
        for seed in range(3):
            method = subject.fresh()
            raw = compare.cast(subject.raw(method, seed=seed, rewards="graded"), dtype)
            batch = prepared(method, raw)
            evaluation = subject.evaluate(method, batch).map(lambda t: compare.cast_tensor(t, dtype))  # noqa: B023
            low = subject.objective(method, batch, evaluation)
            exact = prepared(subject.fresh(), compare.cast(raw, torch.float64))
            up = evaluation.map(lambda t: compare.cast_tensor(t, torch.float64))
            high = subject.objective(subject.fresh(), exact, up)
            expect(len(low.batch) == len(high.batch), f"{dtype}: other trajectories are dropped")
            errors.append(max(compare.relative_error(low.gradient[n], g) for n, g in high.gradient.items()))
        # a decision whose ratio lies on an edge may fall on either side of it: not in every draw
        expect(min(errors) <= tolerance, f"{dtype}: gradient off by {min(errors):.2g} of its norm")


def _finite_iteration(subject: Subject, batch: Batch, where: str) -> Step:
    """One iteration on a batch, in which everything is finite."""
    method = subject.fresh()
    start = compare.state_of(method)
    step = subject.step(method, batch)
    compare.finite(step.tensors(), step.batch.mask, where)
    for part in method.parts:
        part.after_step(step.evaluation.detach(), step.batch)
    for part in method.parts:
        part.observe(step.batch)
    compare.finite_state(method, start, where)
    return step
