"""The laws that every method obeys, each a function that raises AssertionError with where it does not hold."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from polopt.batch import ABSENT, Batch
from polopt.engine.gradient import backward
from polopt.engine.seeding import generator
from polopt.testing import compare
from polopt.testing.compare import Frozen, expect
from polopt.testing.data import TinyActor, outside
from polopt.testing.subject import POOL, PROMPTS, ROLLOUTS, Step, Subject, draws, prepared

EXACT, CLOSE = 1e-10, 1e-8


@dataclass(frozen=True)
class Law:
    """A check with its name's long form."""

    check: Callable[[Subject], None]
    statement: str
    unusual: bool
    """Its data may be refused with a PoloptError."""


LAWS: dict[str, Law] = {}


def law(unusual: bool = False) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Adds a check to the battery under its function's name; the docstring is what it says if it fails."""

    def add(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        LAWS[check.__name__] = Law(check, " ".join((check.__doc__ or "").split()), unusual)
        return check

    return add


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
def padding_does_not_matter(subject: Subject) -> None:
    """Further columns and rows outside the mask change neither loss nor gradient, and get none."""
    method = subject.fresh()
    raw = subject.raw(method)
    plain = subject.step(method, raw)
    wide = compare.widen(raw, 3)
    extra = compare.widen(raw, 3)[:2]
    extra.mask = torch.zeros_like(extra.mask)
    extra.rewards = torch.full_like(extra.rewards, torch.nan)
    extra.group = extra.group.max() + 1000 + torch.arange(2)
    padded = cast(Batch, torch.cat([wide, extra], 0))  # type: ignore[arg-type]
    method = subject.fresh()
    found = subject.step(method, padded)
    compare.close("loss", found.loss, plain.loss, CLOSE)
    steps = raw.mask.shape[1]
    for name, gradient in found.gradient.items():
        size = len(plain.gradient[name])
        compare.close(f"gradient of {name}", gradient[:size, :steps], plain.gradient[name], CLOSE)
        outer = gradient.clone()
        outer[:size, :steps] = 0
        expect(not bool(outer.any()), f"padding has a gradient of {name}")


@law()
def garbage_outside_the_mask_does_not_matter(subject: Subject) -> None:
    """Whatever lies outside the mask, NaN and infinities included, loss and gradient are the same to the bit."""
    method = subject.fresh()
    raw = subject.raw(method)
    tidy = compare.fill_outside(raw, 0.0)
    clean = prepared(subject.fresh(), tidy)
    plain = subject.objective(method, clean, subject.evaluate(method, clean).where(clean.mask))
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        method = subject.fresh()
        batch = prepared(method, compare.fill_outside(raw, garbage))
        evaluation = subject.evaluate(method, batch).map(lambda t, m=batch.mask, g=garbage: outside(t, m, g))
        found = subject.objective(method, batch, evaluation)
        compare.same(
            {"loss": found.loss} | found.gradient, {"loss": plain.loss} | plain.gradient, f"{garbage}:"
        )


@law()
def order_does_not_matter(subject: Subject) -> None:
    """Permuting trajectories permutes the gradient; renumbering groups changes nothing."""
    method = subject.fresh()
    raw = subject.raw(method, rewards="graded")
    first, second = (prepared(subject.fresh(), raw, seed) for seed in (0, 1))
    drawn = first.shape != second.shape or not torch.equal(
        first.advantages * first.weights, second.advantages * second.weights
    )
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(7))
    names = torch.randperm(50, generator=torch.Generator().manual_seed(8))
    plain = subject.objective(method, first)
    if drawn:  # the draws belong to places, so only the loss can be asked
        order = order[order < len(first)]
    moved = (first if drawn else raw)[order].clone()
    moved.group = names[moved.group]
    method = subject.fresh()
    if drawn:
        moved.loss_weight = method.surrogate.loss_weights(moved)
    found = subject.objective(method, moved if drawn else prepared(method, moved))
    compare.close("loss", found.loss, plain.loss, CLOSE)
    place, before = (torch.argsort(b.payload["row"], stable=True) for b in (found.batch, plain.batch))
    for name, gradient in found.gradient.items():
        compare.close(f"gradient of {name}", gradient[place], plain.gradient[name][before], CLOSE)


@law()
def micro_batches_do_not_matter(subject: Subject) -> None:
    """The parameters' gradient is that of the whole minibatch at once, for micro-batches of any size (1e-10)."""
    method = subject.fresh()
    batch = prepared(method, subject.raw(method))
    options: dict[str, Any] = {"options": method.evaluation_options()}
    whole = TinyActor(0, noise=0.15)
    evaluation = whole.evaluate(batch, method.evaluated, **method.evaluation_options())
    loss = method.objective(evaluation, batch)
    if loss.requires_grad:
        loss.backward()
    expected = compare.flat_gradient(whole.module)
    for rows in (1, 2, 3, len(batch)):
        actor = TinyActor(0, noise=0.15, rows=rows)
        found = backward(
            actor, batch, method.objective, method.evaluated, separable=method.separable, **options
        )
        compare.close(f"micro-batches of {rows}: loss", found.loss, loss.detach(), CLOSE)
        compare.close(
            f"micro-batches of {rows}: gradient", compare.flat_gradient(actor.module), expected, EXACT
        )


@law()
def coupling_is_what_is_declared(subject: Subject) -> None:
    """The surrogate's gradient depends on no more than its `coupling` says: the decision, its sequence or its group."""
    method = subject.fresh()
    coupling = method.surrogate.coupling
    if coupling == "batch":
        return
    batch = prepared(method, subject.raw(method))
    evaluation = subject.evaluate(method, batch).where(batch.mask)

    def gradient(logp: Tensor) -> Tensor:
        leaf = logp.clone().requires_grad_()
        loss = method.surrogate(replace(evaluation, logp=leaf), batch)
        found = (
            torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
            if loss.requires_grad
            else None
        )
        return torch.zeros_like(leaf) if found is None else found[0]

    before = gradient(evaluation.logp)
    for row in range(len(batch)):
        if not bool(batch.mask[row].any()):
            continue
        block = torch.zeros_like(batch.mask)
        match coupling:
            case "decision":
                block[row, int(batch.mask[row].nonzero()[0])] = True
            case "sequence":
                block[row] = True
            case "group":
                block[batch.group == batch.group[row]] = True
        after = gradient(evaluation.logp + 0.05 * (block & batch.mask))
        others = torch.where(block, 0.0, after), torch.where(block, 0.0, before)
        compare.close(f"another {coupling} changed: gradient of logp", *others, CLOSE)


@law()
def gradient_is_the_derivative(subject: Subject) -> None:
    """The gradient agrees with finite differences in float64, what is detached held constant (`gradcheck`)."""
    problems: list[str] = []
    for seed in range(3):
        method = subject.fresh()
        batch = prepared(method, subject.raw(method, seed=seed))
        evaluation = subject.evaluate(method, batch).where(batch.mask)
        names = [name for name in ("logp", "entropy", "value") if name in evaluation.tensors()]

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


@law()
def data_are_constant(subject: Subject) -> None:
    """No gradient flows into the batch: rewards, old and reference values, advantages, weights, signals."""
    method = subject.fresh()
    raw = subject.raw(method)
    leaves = raw.apply(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    batch = prepared(method, leaves)
    made = {name: getattr(batch, name) for name in ("advantages", "weights", "loss_weight")}
    made |= {} if batch.signals is None else dict(batch.signals.items())
    for name, tensor in made.items():
        expect(not tensor.requires_grad, f"{name} carries a gradient")
    inputs = batch.apply(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
    evaluation = subject.evaluate(method, batch).map(
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t
    )
    loss = method.objective(evaluation, inputs)
    fields = {
        ".".join(key) if isinstance(key, tuple) else key: tensor
        for key, tensor in inputs.items(include_nested=True, leaves_only=True)
        if tensor.requires_grad
    }
    if not loss.requires_grad:
        return
    found = torch.autograd.grad(loss, list(fields.values()), allow_unused=True)
    for name, gradient in zip(fields, found, strict=True):
        expect(gradient is None or not bool((gradient != 0).any()), f"a gradient reaches {name}")


@law()
def unselected_trajectories_are_silent(subject: Subject) -> None:
    """A trajectory of weight 0 has no gradient; nor has one of advantage 0 if `zero_advantage_is_silent`."""
    method = subject.fresh()
    batch = prepared(method, subject.raw(method))
    silent = torch.arange(len(batch)) % 3 == 1
    batch.weights = torch.where(silent[:, None], 0.0, batch.weights)
    batch.loss_weight = method.surrogate.loss_weights(batch)
    step = subject.objective(method, batch)
    for name, gradient in step.gradient.items():
        expect(not bool(gradient[silent].any()), f"weight 0, and a gradient of {name}")
    if not method.surrogate.zero_advantage_is_silent:
        return
    method = subject.fresh()
    batch = prepared(method, subject.raw(method))
    batch.advantages = torch.where(silent[:, None], 0.0, batch.advantages)
    leaf = subject.evaluate(method, batch).logp.clone().requires_grad_()
    loss = method.surrogate(replace(subject.evaluate(method, batch), logp=leaf).where(batch.mask), batch)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, leaf)
        expect(not bool(gradient[silent].any()), "advantage 0, and a gradient of logp")


@law()
def same_draws_same_result(subject: Subject) -> None:
    """Two copies with the same draws agree to the bit, whatever torch's global generator does, which none uses."""
    torch_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(1)
        first = subject.iterate(subject.fresh(), range(3))
        torch.manual_seed(2)
        before = torch.random.get_rng_state()
        second = subject.iterate(subject.fresh(), range(3))
        expect(torch.equal(before, torch.random.get_rng_state()), "torch's global generator was used")
    finally:
        torch.random.set_rng_state(torch_state)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        compare.same(b, a, f"iteration {number}:")


@law()
def state_is_in_the_state_dict(subject: Subject) -> None:
    """A copy that loads the `state_dict` continues to the bit like the original; the state is tensors and JSON."""
    original, copy = subject.fresh(), subject.fresh()
    subject.iterate(original, range(3))
    state = compare.state_of(original)
    loaded = {
        n: v.clone() if isinstance(v, Tensor) else deepcopy(v) for n, v in original.state_dict().items()
    }
    copy.load_state_dict(loaded)
    compare.same(compare.state_of(copy), state, "after loading:")
    expected = subject.iterate(original, range(3, 6))
    for number, (a, b) in enumerate(zip(expected, subject.iterate(copy, range(3, 6)), strict=True)):
        compare.same(b, a, f"iteration {number + 3}:")
    compare.same(compare.state_of(copy), compare.state_of(original), "after three more iterations:")


@law()
def state_changes_where_it_may(subject: Subject) -> None:
    """Buffers change in `observe`, `after_step`, the sampler and the optimizer alone: preparing or losing twice is safe."""
    method = subject.fresh()
    subject.iterate(method, range(2))
    state = compare.state_of(method)
    subject.step(method, subject.raw(method, seed=5), iteration=2)
    compare.same(compare.state_of(method), state, "after prepare and objective:")


@law()
def inputs_are_not_modified(subject: Subject) -> None:
    """No part changes the batch or the evaluation it is given, in place or by assignment."""
    method = subject.fresh()
    problems: list[str] = []
    handles = [handle for part in method.parts for handle in compare.watch(part, problems)]
    raw = subject.raw(method)
    kept = raw.clone()
    step = subject.step(method, raw)
    compare.same(compare.leaves(raw), compare.leaves(kept), "the batch given to prepare:")
    for handle in handles:
        handle.remove()
    for part in method.parts:
        for name, call in (
            ("signals", lambda p=part: p.signals(step.batch)),
            ("after_step", lambda p=part: p.after_step(step.evaluation.detach(), step.batch)),
            ("observe", lambda p=part: p.observe(step.batch)),
        ):
            before = compare.snapshot(step.batch, step.evaluation)
            call()
            if compare.differ(before, compare.snapshot(step.batch, step.evaluation)):
                problems.append(f"{part.slot} {part.name}.{name} changes its input")
    expect(not problems, "; ".join(problems))


@law()
def prompts_and_budget_add_up(subject: Subject) -> None:
    """The sampler gives as many prompts of the pool as asked for, the budget shares out the total, none negative."""
    method = subject.fresh()
    for iteration in range(3):
        draw = draws(0, iteration)
        prompts = method.sampler(POOL, PROMPTS, partial(generator, 0, "epoch"), draw)
        inside = bool(((prompts >= 0) & (prompts < POOL)).all())
        expect(prompts.shape == (PROMPTS,) and inside, f"prompts {prompts.tolist()} of a pool of {POOL}")
        for total in (ROLLOUTS, ROLLOUTS + 3):
            counts = method.budget(prompts, total, draw)
            right = counts.shape == (PROMPTS,) and int(counts.sum()) == total and bool((counts >= 0).all())
            expect(right, f"budget {counts.tolist()} of {total}")
        accepted = method.sampler.accepts(subject.raw(method))
        expect(accepted.dtype == torch.bool and accepted.dim() == 1, "accepts is not [N] of booleans")


@law()
def optimizer_steps_are_finite(subject: Subject) -> None:
    """The optimizer makes finite steps, for a gradient of 0 too."""
    method = subject.fresh()
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = method.optimizer.build([parameter], 1e-2)
    for scale in (0.0, 1.0, 1e-30, 1e8):
        parameter.grad = scale * torch.arange(4, dtype=torch.float64)
        optimizer.step()
        expect(bool(parameter.isfinite().all()), f"gradient of {scale}")


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
