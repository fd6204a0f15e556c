"""Laws about what must not matter: padding, garbage, order, micro-batches, what was not selected."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.engine.gradient import backward
from polopt.testing import compare
from polopt.testing.compare import expect
from polopt.testing.data import TinyActor, outside
from polopt.testing.laws import law
from polopt.testing.subject import Subject, prepared

EXACT, CLOSE = 1e-10, 1e-8


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
