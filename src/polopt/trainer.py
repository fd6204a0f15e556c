"""The loop, one for all domains:

    sampler -> budget -> rollout -> shaping -> advantage -> selection
        -> [epochs x minibatches: evaluate -> surrogate + regularizers -> backward -> optimizer]
        -> log -> checkpoint -> score

Every draw is seeded by (run seed, stream, iteration), so a run that is killed and resumed continues bit for bit.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor

from polopt.batch import Batch, Evaluation, concatenate
from polopt.domain import Actor, Plan, ReplayActor, Rollout, Task
from polopt.engine import diagnostics
from polopt.engine.diagnostics import Metrics
from polopt.engine.gradient import DIFFERENTIABLE, Backward, backward, evaluate_rows
from polopt.engine.group_gradients import backward_by_group
from polopt.engine.hessian import hessian_product
from polopt.engine.minibatches import minibatches
from polopt.engine.optimization import FiniteGuard, learning_rate
from polopt.engine.ranks import Ranks
from polopt.engine.record import Record, Reporter
from polopt.engine.replay_buffer import ReplayBuffer
from polopt.engine.requirements import check_off_policy, check_requirements
from polopt.engine.scores import SCORES, check_scores, score_vectors
from polopt.engine.seeding import generator
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.parts import Draw
from polopt.trainer_config import TrainerConfig


class Step(NamedTuple):
    """What an optimizer step was about."""

    metrics: Metrics
    evaluation: Evaluation
    batch: Batch
    """The evaluated trajectories."""


class Trainer:
    """Trains an actor on a task by a method.

    Args:
        actor: the policy in its domain.
        task: start states and outcomes.
        method: what to descend.
        config: sizes and lengths; unset fields take the method's own defaults.
        out: run folder; None keeps nothing on disk.
        description: written to the run folder as its configuration.
        reporters: get every metric as it comes.

    Raises:
        ConfigError: the method needs what the actor, the task or the configuration cannot give.
    """

    def __init__(
        self,
        actor: Actor,
        task: Task,
        method: Method,
        config: TrainerConfig | None = None,
        *,
        out: Path | str | None = None,
        description: dict[str, Any] | None = None,
        reporters: Sequence[Reporter] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.actor, self.task, self.method = actor, task, method
        whole_trajectories = actor.independent_decisions and not method.decision_wise
        self.config = (config or TrainerConfig()).with_defaults(method.defaults, whole_trajectories)
        self.ranks = ranks or Ranks.start(self.config.sharding, self.config.ranks)
        self._check()
        self.ranks.shard(actor.module)
        self.parameters = [p for p in actor.module.parameters() if p.requires_grad]
        self.optimizer = method.optimizer.build(self.parameters, self.config.lr)
        self.guard = FiniteGuard(self.config.patience)
        self.record = Record(out, description or {}, self.config.keep, reporters, self.ranks)
        self.iteration = 0
        self.before: dict[str, Any] = {}
        self.replayed: list[Batch] = []
        self.buffer = ReplayBuffer(self.config.buffer_size)
        self._stop = threading.Event()

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train to the end, or to the next interrupt.

        Args:
            resume: continue from the run folder's newest intact checkpoint.

        Returns:
            The summary: scores before and after with intervals, samples before and after, `interrupted`.
        """
        with self.record.open(self, resume) as record, self._interrupts():
            if not self.before:
                self.before = self.score()
                record.save(self)
            while self.iteration < self.config.iterations and not self._stopped():
                started = time.perf_counter()
                metrics, samples = self.iterate()
                metrics |= {
                    "time/iteration": time.perf_counter() - started,
                    "memory/peak": diagnostics.peak_memory(),
                }
                due = self.config.score_every and self.iteration % self.config.score_every == 0
                if due and self.iteration < self.config.iterations:
                    metrics |= {k: v for k, v in self.score().items() if k != "samples"}
                record.log(self.iteration, metrics, samples)
                if self.iteration % self.config.checkpoint_every == 0:
                    record.save(self)
            interrupted = self.iteration < self.config.iterations
            record.save(self)
            after = {} if interrupted else self.score()
            return record.finish(self.iteration, self.before, after, interrupted)

    def iterate(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """One rollout and its updates; returns the metrics and a few samples."""
        lr = learning_rate(
            self.config.lr,
            self.config.lr_schedule,
            self.config.lr_warmup,
            self.iteration,
            self.config.iterations,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for part in self.method.parts:
            part.progress, part.learning_rate = self.iteration / max(1, self.config.iterations - 1), lr
        with self.method.optimizer.at_rollout(self.optimizer):
            rollout = self._collect(self._draw)
            metrics = dict(rollout.metrics) | diagnostics.describe_rollout(
                rollout.batch, self.task.reward_names
            )
            started = time.perf_counter()
            batch = self.method.prepare(self._with_evaluations(rollout.batch), self._draw)
        metrics |= diagnostics.describe_advantages(batch) | {"time/prepare": time.perf_counter() - started}
        started = time.perf_counter()
        update = self._update_off_policy if self.method.off_policy else self._update
        metrics |= update(batch) if len(batch) else {"updates": 0.0}
        metrics |= {"lr": lr, "updates/skipped": float(self.guard.skipped)}
        metrics["time/update"] = time.perf_counter() - started
        for part in self.method.parts:
            part.observe(batch)
        metrics |= self.actor.observe(rollout.batch)
        self.iteration += 1
        return metrics, rollout.samples

    def score(self) -> dict[str, Any]:
        """Statistics on the held-out split, and samples of it."""
        size = min(self.config.score_prompts, self.task.heldout_size)
        plan = Plan(torch.arange(size), torch.full((size,), self.config.score_rollouts), heldout=True)
        rollout = self._rollout(plan, generator(self.config.seed, "score", self.iteration))
        return {**self.actor.score(self.task, rollout.batch), "samples": rollout.samples[:3]}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not derived from counters."""
        model, optimizer = self.ranks.full_state(self.actor.module, self.optimizer)
        return {
            "iteration": self.iteration,
            "model": model,
            "optimizer": optimizer,
            "method": dict(self.method.state_dict()),
            "replay": {str(i): batch.to_tensors() for i, batch in enumerate(self.replayed)},
            "buffer": self.buffer.state_dict(),
            "task": self.task.state_dict(),
            "trainer": {
                "before": self.before,
                "skipped": self.guard.skipped,
                "in_a_row": self.guard.in_a_row,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.iteration = state["iteration"]
        self.ranks.load_full_state(self.actor.module, self.optimizer, state["model"], state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.replayed = [Batch.from_tensors(tensors) for tensors in state["replay"].values()]
        self.buffer.load_state_dict(state["buffer"])
        self.task.load_state_dict(state["task"])
        self.before = state["trainer"]["before"]
        self.guard.skipped, self.guard.in_a_row = state["trainer"]["skipped"], state["trainer"]["in_a_row"]

    def _draw(self, stream: str) -> torch.Generator:
        return generator(self.config.seed, stream, self.iteration)

    def _collect(self, draw: Draw) -> Rollout:
        """Rollouts until the sampler has accepted as many trajectories as were asked for, or its rounds are used up."""
        wanted, kept, metrics, samples = self.config.prompts * self.config.rollouts, [], [], []
        epoch = partial(generator, self.config.seed, "epoch")
        if asked := self.method.sampler.to_score(self.task.train_size, epoch):
            plan = Plan(asked[0], torch.full((len(asked[0]),), asked[1]))
            scored = self._rollout(plan, draw("scoring"))
            self.method.sampler.take_scores(scored.batch)
            metrics.append(dict(scored.metrics))
        for number in range(self.method.sampler.max_rounds):
            missing = wanted - sum(len(b) for b in kept)
            prompts = min(self.config.prompts, -(-missing // self.config.rollouts))
            if prompts <= 0:
                break
            prompt_ids = self.method.sampler(self.task.train_size, prompts, epoch, draw)
            counts = self.method.budget(prompt_ids, prompts * self.config.rollouts, draw)
            rollout = self._rollout(
                Plan(prompt_ids, counts), draw(f"rollout {number}" if number else "rollout")
            )
            metrics.append(dict(rollout.metrics))
            samples += rollout.samples
            kept.append(rollout.batch[self.method.sampler.accepts(rollout.batch)])
        totals = {name: sum(m.get(name, 0.0) for m in metrics) for name in metrics[0]}
        batch = concatenate(kept)
        batch.policy_version = torch.full((len(batch),), self.iteration)
        return Rollout(batch, {**totals, "rounds": float(len(metrics))}, samples)

    def _rollout(self, plan: Plan, draws: torch.Generator) -> Rollout:
        with self.ranks.full_parameters():
            mine = self.actor.rollout(self.task, plan.part(self.ranks.rank, self.ranks.world), draws)
        names = sorted(mine.metrics)
        totals = self.ranks.sum(torch.tensor([mine.metrics[n] for n in names], dtype=torch.float64))
        return Rollout(
            self.ranks.gather(mine.batch), dict(zip(names, totals.tolist(), strict=True)), mine.samples
        )

    def _with_evaluations(self, batch: Batch) -> Batch:
        """The batch with what the parts require of the behaviour and reference policies, and the sampler's mismatch."""
        if self.recomputes or not self.actor.exact_sampler:
            batch.sampler_logp = batch.old_logp if batch.sampler_logp is None else batch.sampler_logp
        asked = {name for name in self.method.requires if not batch.has(name)}
        rows, options = torch.arange(len(batch)), self.method.evaluation_options()
        old = {name[4:] for name in asked if name.startswith("old_")} | (
            {"logp"} if self.recomputes else set()
        )
        if old:
            batch.set_evaluated(
                "old", evaluate_rows(self.actor, batch, rows, frozenset(old), options, self.ranks)
            )
        if reference := {name[4:] for name in asked if name.startswith("ref_")}:
            with self.actor.reference():
                found = evaluate_rows(self.actor, batch, rows, frozenset(reference), options, self.ranks)
            batch.set_evaluated("ref", found)
        for name in sorted(asked & SCORES):
            found = score_vectors(self.actor, batch, per_decision=name == "decision_scores", ranks=self.ranks)
            setattr(batch, name, found)
        return batch

    @property
    def recomputes(self) -> bool:
        """Old log-probabilities are evaluated by the trainer: its sampler is not exact and the policy moves on them."""
        return not self.actor.exact_sampler and not self.anchors

    @property
    def anchors(self) -> bool:
        """One update per rollout with an inexact sampler: the evaluation itself is the behaviour policy's."""
        return not self.actor.exact_sampler and self.config.epochs * self.config.minibatches == 1

    @property
    def cuts_decisions(self) -> bool:
        """Minibatches are of decisions, not of trajectories: neither the policy nor the loss needs them together."""
        return self.actor.independent_decisions and self.method.decision_wise

    def _update(self, batch: Batch) -> Metrics:
        steps: list[Metrics] = []
        epochs: list[Metrics] = []
        keep_groups = self.method.surrogate.coupling in ("group", "batch")
        if batch.sampler_logp is not None and not self.anchors:
            batch.weights = batch.weights * self._sampler_weight(batch)
        data = concatenate([*self.replayed, batch])
        if self.cuts_decisions:
            data = data.decisions(self.method.requires)
        replaying = bool(self.replayed)
        self.replayed = [*self.replayed, batch][max(0, len(self.replayed) + 2 - self.config.replay) :]
        for epoch in range(self.config.epochs):
            draws = self._draw(f"minibatches {epoch}")
            rows = list(minibatches(data.group, self.config.minibatches, keep_groups, draws))
            shuffled = data.take(torch.cat(rows))
            seen: list[Step] = []
            for minibatch in shuffled.split([len(r) for r in rows]):
                minibatch.loss_weight = self.method.surrogate.loss_weights(minibatch)
                if step := self._step(minibatch, fresh=not steps and not replaying):
                    steps.append(step.metrics)
                    seen.append(step)
            if seen:
                evaluations = [step.evaluation for step in seen]
                described = _all_of(seen, shuffled)
                epochs.append(diagnostics.describe_update(evaluations, described, self.method.surrogate))
        return {"updates": float(len(steps))} | diagnostics.average(steps) | diagnostics.average(epochs)

    def _update_off_policy(self, batch: Batch) -> Metrics:
        """Steps on decisions from the replay buffer, as many per decision of `batch` as `update_ratio` says."""
        actor, c = cast(ReplayActor, self.actor), self.config
        decisions = batch.decisions(self.method.requires)
        self.buffer.add(decisions)
        steps: list[Metrics] = []
        draws = self._draw("replay buffer")
        due = self.buffer.seen >= c.learning_starts
        for _ in range(round(c.update_ratio * len(decisions)) if due else 0):
            minibatch = actor.redraw(self.buffer.draw(c.batch_size, draws), draws)
            minibatch.loss_weight = self.method.surrogate.loss_weights(minibatch)
            if step := self._step(minibatch, fresh=False):
                actor.after_step(**self.method.evaluation_options())
                steps.append(step.metrics | diagnostics.describe_off_policy(step.evaluation))
        return {"updates": float(len(steps)), "buffer": float(len(self.buffer))} | diagnostics.average(steps)

    def _step(self, batch: Batch, fresh: bool) -> Step | None:
        rows, averages = self._teaching_rows(batch), self.method.optimizer.averages_rollouts
        if averages and not len(rows):
            rows = batch.mask.any(-1).nonzero()[:, 0]
        if not len(rows):
            return None
        with self.method.optimizer.at_rollout(self.optimizer):
            found = self._gradient(batch, rows, fresh)
        self.method.optimizer.correct_gradient(self.optimizer, self._hessian_product, self._draw)
        limit = math.inf if averages else self.config.max_grad_norm
        loss, norm = float(found.loss), float(self.ranks.clip_gradients(self.parameters, limit))
        evaluated = batch if len(rows) == len(batch) else batch[rows]
        if self.anchors:
            evaluated = self._anchored(found.evaluation, evaluated)
        if self.guard.accepts(loss, norm):
            self.optimizer.step()
            for part in self.method.parts:
                part.after_step(found.evaluation, evaluated)
        for parameter in self.parameters:
            parameter.grad = None
        metrics = {"loss": loss, "grad_norm": norm, "rows/evaluated": float(len(rows))}
        return Step(metrics, found.evaluation, evaluated)

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
        names = self.method.evaluated
        current = self._known(batch.take(rows), names) if fresh and not self.anchors else None
        options = self.method.evaluation_options()
        return backward(
            self.actor, batch, self._objective, names, separable=self.method.separable,
            rows=None if len(rows) == len(batch) else rows, current=current, options=options, ranks=self.ranks,
        )  # fmt: skip

    def _objective(self, evaluation: Evaluation, batch: Batch) -> Tensor:
        return self.method.objective(evaluation, self._anchored(evaluation, batch) if self.anchors else batch)

    def _hessian_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """The loss's Hessian at the present parameters times a direction, from another rollout there."""

        def draw(stream: str) -> torch.Generator:
            return self._draw(f"second {stream}")

        batch = self.method.prepare(self._with_evaluations(self._collect(draw).batch), draw)
        batch.loss_weight = self.method.surrogate.loss_weights(batch)
        return hessian_product(
            self.actor, batch, self._objective, self.method.evaluated, direction, parameters=self.parameters,
            options=self.method.evaluation_options(), ranks=self.ranks,
        )  # fmt: skip

    def _known(self, batch: Batch, names: frozenset[str]) -> Evaluation | None:
        """The current evaluation, if the batch already holds all of it."""
        fields: dict[str, Any] = {name: getattr(batch, f"old_{name}", None) for name in names}
        return None if any(v is None for v in fields.values()) else Evaluation(**fields)

    def _teaching_rows(self, batch: Batch) -> Int[Tensor, " n"]:
        teaches = (batch.loss_weight != 0).any(-1)
        silent = self.method.surrogate.zero_advantage_is_silent and not len(self.method.regularizers)
        if self.config.skip_silent and silent:
            teaches &= (batch.advantages != 0).any(-1)
        return teaches.nonzero()[:, 0]

    def _anchored(self, evaluation: Evaluation, batch: Batch) -> Batch:
        """The batch with the evaluation as the behaviour policy's, weighted for the sampler that drew instead of it."""
        batch = batch.clone(recurse=False)
        batch.old_logp = evaluation.logp.detach()
        batch.loss_weight = batch.loss_weight * self._sampler_weight(batch)
        return batch

    def _sampler_weight(self, batch: Batch) -> Tensor:
        gap = torch.where(batch.mask, batch.old_logp - batch.sampler_logp, 0.0)
        return gap.exp().clamp(max=self.config.sampler_cap)

    def _check(self) -> None:
        """Refuse what cannot work, before anything runs."""
        check_requirements(self.method, self.actor.domain, self.actor.provides, self.actor.own_rollouts)
        check_off_policy(self.method, self.config.model_dump())
        for name in sorted(self.method.requires & SCORES):
            check_scores(name, self.config.prompts * self.config.rollouts, 1, self.actor.module, self.ranks)
        if self.method.optimizer.per_group_gradients and not self.method.separable:
            raise ConfigError(
                f"optimizer {self.method.optimizer.name}: needs a loss that is a sum over trajectories"
            )
        optimizer, c = self.method.optimizer, self.config
        if optimizer.averages_rollouts and c.epochs * c.minibatches * c.replay > 1:
            raise ConfigError(
                f"optimizer {optimizer.name}: needs trainer.epochs, minibatches and replay of 1, one step per rollout"
            )
        others = self.method.evaluated.intersection(DIFFERENTIABLE) - {"logp", "entropy"}
        if optimizer.second_rollout and (others or not self.method.separable or c.sharding != "none"):
            raise ConfigError(
                f"optimizer {optimizer.name}: needs whole parameters, and a loss that is a sum over trajectories of "
                "functions of logp and entropy"
            )
        rows = self.config.prompts * self.config.rollouts
        if self.config.minibatches > rows and not self.cuts_decisions:
            raise ConfigError(
                f"trainer.minibatches = {self.config.minibatches}: more than the rollouts of an iteration"
            )

    def _stopped(self) -> bool:
        """Whether any rank was told to stop."""
        return bool(self.ranks.sum(torch.tensor(self._stop.is_set())))

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops after the running iteration, the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _all_of(steps: list[Step], epoch: Batch) -> Batch:
    """The evaluated trajectories of an epoch's steps, one after the other."""
    if len(steps) == 1:
        return steps[0].batch
    if sum(len(step.batch) for step in steps) < len(epoch):
        return cast(Batch, torch.cat(cast(Any, [step.batch for step in steps])))
    epoch.loss_weight = torch.cat([step.batch.loss_weight for step in steps])
    return epoch
