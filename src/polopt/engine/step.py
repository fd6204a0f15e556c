"""One optimizer step: which rows to evaluate, their gradient, clipping, and the step if its numbers are finite."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.domain import Actor
from polopt.engine.behaviour import anchored, anchors
from polopt.engine.compiled import CompiledGradient
from polopt.engine.diagnostics import Metrics
from polopt.engine.gradient import Backward, backward
from polopt.engine.group_gradients import backward_by_group
from polopt.engine.hessian import hessian_product
from polopt.engine.minibatches import usual_rows
from polopt.engine.optimization import FiniteGuard
from polopt.engine.ranks import Ranks
from polopt.method import Method
from polopt.parts import Draw
from polopt.trainer_config import TrainerConfig

SecondRollout = Callable[[], Batch]
"""Makes another rollout at the present parameters, with advantages and weights."""


class Step(NamedTuple):
    """What an optimizer step was about."""

    metrics: Metrics
    evaluation: Evaluation
    batch: Batch
    """The evaluated trajectories."""


class Stepper:
    """Takes the optimizer steps of a run.

    Args:
        actor: evaluates the policy.
        method: gives the loss, and what its optimizer part asks for around a step.
        config: how far a step goes.
        ranks: the processes that share the work.
        optimizer: holds the parameters.
    """

    def __init__(
        self,
        actor: Actor,
        method: Method,
        config: TrainerConfig,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.actor, self.method, self.config, self.ranks = actor, method, config, ranks
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.guard = FiniteGuard(config.patience)
        self.anchors = anchors(actor, config)
        self.compiled = (
            CompiledGradient(actor, method.objective, method.evaluated, usual_rows(actor, method, config))
            if config.compile
            else None
        )

    def take(self, batch: Batch, fresh: bool, draw: Draw, second_rollout: SecondRollout) -> Step | None:
        """A step on a minibatch; None where no row can teach.

        Args:
            batch: the minibatch, with `loss_weight`.
            fresh: the policy has not moved since the rollout, whose evaluations are therefore the present ones.
            draw: the iteration's randomness.
            second_rollout: for optimizers that ask for Hessian-vector products.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        rows, averages = self._teaching_rows(batch), self.method.optimizer.averages_rollouts
        if averages and not len(rows):
            rows = batch.mask.any(-1).nonzero()[:, 0]
        if not len(rows):
            return None
        with self.method.optimizer.at_rollout(self.optimizer):
            found = self._gradient(batch, rows, fresh)
        product = partial(self._hessian_product, second_rollout)
        self.method.optimizer.correct_gradient(self.optimizer, product, draw)
        limit = math.inf if averages else self.config.max_grad_norm
        loss, norm = float(found.loss), float(self.ranks.clip_gradients(self.parameters, limit))
        evaluated = batch if len(rows) == len(batch) else batch[rows]
        if self.anchors:
            evaluated = anchored(found.evaluation, evaluated, self.config.sampler_cap)
        if self.guard.accepts(loss, norm):
            self.optimizer.step()
            for part in self.method.parts:
                part.after_step(found.evaluation, evaluated)
        for parameter in self.parameters:
            parameter.grad = None
        metrics = {"loss": loss, "grad_norm": norm, "rows/evaluated": float(len(rows))}
        return Step(metrics, found.evaluation, evaluated)

    def _teaching_rows(self, batch: Batch) -> Int[Tensor, " n"]:
        silent = self.method.surrogate.zero_advantage_is_silent and not len(self.method.regularizers)
        factors = [batch.loss_weight]
        if self.config.skip_silent and silent:
            factors.append(batch.advantages)
        if all(int(factor.count_nonzero()) == factor.numel() for factor in factors):
            return torch.arange(len(batch), device=batch.loss_weight.device)
        return torch.stack([(factor != 0).any(-1) for factor in factors]).all(0).nonzero()[:, 0]

    def _gradient(self, batch: Batch, rows: Int[Tensor, " n"], fresh: bool) -> Backward:
        """Gradients into the parameters, and the optimizer's share of the learning rate if it sets one."""
        optimizer = self.method.optimizer
        if not optimizer.per_group_gradients:
            return self._backward(batch, rows, fresh)
        each = partial(self._backward, batch, fresh=fresh)
        found, agreement = backward_by_group(each, self.parameters, rows, batch.group[rows])
        share = optimizer.rate_share(agreement.square_sum, agreement.mean_square, agreement.groups)
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.method.surrogate.learning_rate
        return found

    def _backward(self, batch: Batch, rows: Int[Tensor, " n"], fresh: bool) -> Backward:
        if self.compiled is not None:
            return self.compiled.backward(batch, rows, self.method.evaluation_options())
        names = self.method.evaluated
        current = _known(batch.take(rows), names) if fresh and not self.anchors else None
        options = self.method.evaluation_options()
        return backward(
            self.actor, batch, self._objective, names, separable=self.method.separable,
            rows=None if len(rows) == len(batch) else rows, current=current, options=options, ranks=self.ranks,
        )  # fmt: skip

    def _objective(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        if self.anchors:
            batch = anchored(evaluation, batch, self.config.sampler_cap)
        return self.method.objective(evaluation, batch)

    def _hessian_product(self, second_rollout: SecondRollout, direction: Sequence[Tensor]) -> list[Tensor]:
        """The loss's Hessian at the present parameters times a direction, from another rollout there."""
        batch = second_rollout()
        batch.loss_weight = self.method.surrogate.loss_weights(batch)
        return hessian_product(
            self.actor, batch, self._objective, self.method.evaluated, direction, parameters=self.parameters,
            options=self.method.evaluation_options(), ranks=self.ranks,
        )  # fmt: skip


def _known(batch: Batch, names: frozenset[str]) -> Evaluation | None:
    """The current evaluation, if the batch already holds all of it."""
    fields: dict[str, Any] = {name: getattr(batch, f"old_{name}", None) for name in names}
    return None if any(v is None for v in fields.values()) else Evaluation(**fields)
