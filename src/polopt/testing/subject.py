"""A method under test: fresh copies of it, data for it, and one pass over them."""

from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.engine.gradient import DIFFERENTIABLE
from polopt.engine.seeding import generator
from polopt.method import Method
from polopt.parts import Draw
from polopt.testing.data import TinyActor, random_batch

POOL, PROMPTS, ROLLOUTS = 40, 4, 16


class Step(NamedTuple):
    """A prepared minibatch, and the loss on it with its derivatives."""

    batch: Batch
    evaluation: Evaluation
    loss: Tensor
    gradient: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it, by name."""
        prepared = {name: getattr(self.batch, name) for name in ("advantages", "weights", "loss_weight")}
        signals = (
            {} if self.batch.signals is None else {f"signal {k}": v for k, v in self.batch.signals.items()}
        )
        gradient = {f"gradient of {name}": tensor for name, tensor in self.gradient.items()}
        return prepared | signals | {"loss": self.loss} | gradient


class Subject:
    """What the laws are tried on.

    Args:
        method: is never touched; every check works on copies of it.
        columns: number of rewards of its batches.
    """

    def __init__(self, method: Method, columns: int = 1) -> None:
        self._method, self.columns = deepcopy(method), columns
        self.actor = TinyActor(0, noise=0.15)

    def fresh(self, progress: float = 0.0) -> Method:
        """A copy of the method as it was given."""
        method = deepcopy(self._method)
        for part in method.parts:
            part.progress, part.learning_rate = progress, 1e-3
        return method

    def raw(self, method: Method | None = None, **options: Any) -> Batch:
        """A random batch with what the method requires, as a rollout gives it."""
        method = method or self._method
        options = {"columns": self.columns, "options": method.evaluation_options()} | options
        return random_batch(method.requires, **options)

    def evaluate(self, method: Method, batch: Batch) -> Evaluation:
        """The current policy's view of a prepared batch, as `method` asks for it."""
        with torch.no_grad():
            return self.actor.evaluate(batch, method.evaluated, **method.evaluation_options())

    def step(self, method: Method, batch: Batch, seed: int = 0, iteration: int = 0) -> Step:
        """Prepare a batch, and take the loss of all of it."""
        return self.objective(method, prepared(method, batch, seed, iteration))

    def objective(self, method: Method, batch: Batch, evaluation: Evaluation | None = None) -> Step:
        """The loss of a prepared batch and its derivatives with respect to the evaluation."""
        evaluation = self.evaluate(method, batch) if evaluation is None else evaluation
        leaves = {
            name: tensor.detach().clone().requires_grad_(name in DIFFERENTIABLE)
            for name, tensor in evaluation.tensors().items()
        }
        loss = method.objective(Evaluation(**leaves), batch)
        inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if not loss.requires_grad:
            return Step(
                batch, evaluation, loss, {name: torch.zeros_like(leaf) for name, leaf in inputs.items()}
            )
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        return Step(batch, evaluation, loss.detach(), dict(zip(inputs, found, strict=True)))

    def iterate(self, method: Method, iterations: range) -> list[dict[str, Tensor]]:
        """Whole iterations, prompts and budget included; everything they made."""
        made: list[dict[str, Tensor]] = []
        for iteration in iterations:
            draw = draws(0, iteration)
            epoch = partial(generator, 0, "epoch")
            if asked := method.sampler.to_score(POOL, epoch):
                scored = self.raw(method, seed=50 + iteration, groups=[asked[1]] * len(asked[0]))
                scored.prompt_id = asked[0][scored.group]
                method.sampler.take_scores(scored)
            prompts = method.sampler(POOL, PROMPTS, epoch, draw)
            counts = method.budget(prompts, ROLLOUTS, draw)
            raw = self.raw(method, seed=100 + iteration)
            raw.prompt_id = raw.group + 100 + iteration % 2
            step = self.step(method, raw, iteration=iteration)
            for part in method.parts:
                part.after_step(step.evaluation.detach(), step.batch)
            for part in method.parts:
                part.observe(step.batch)
            made.append(
                step.tensors()
                | {"prompts": prompts, "counts": counts, "accepted": method.sampler.accepts(raw)}
            )
        return made


def prepared(method: Method, batch: Batch, seed: int = 0, iteration: int = 0) -> Batch:
    """The batch as a minibatch of itself, ready for the objective."""
    batch = method.prepare(batch, draws(seed, iteration))
    batch.loss_weight = method.surrogate.loss_weights(batch)
    return batch


def draws(seed: int, iteration: int = 0) -> Draw:
    """The run's source of randomness."""
    return lambda stream: generator(seed, stream, iteration)
