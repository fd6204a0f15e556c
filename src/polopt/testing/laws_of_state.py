"""Laws about what a method keeps, draws and changes, and about its sampler, budget and optimizer."""

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from polopt.engine.seeding import generator
from polopt.testing import compare
from polopt.testing.compare import expect
from polopt.testing.laws import law
from polopt.testing.subject import POOL, PROMPTS, ROLLOUTS, Subject, draws, prepared


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
