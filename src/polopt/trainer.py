"""The loop, one for all domains:

    sampler -> budget -> rollout -> shaping -> advantage -> selection
        -> [epochs x minibatches: evaluate -> surrogate + regularizers -> backward -> optimizer]
        -> log -> checkpoint -> score

What happens to an iteration's batch is in `engine/update.py` (minibatches) and `engine/step.py` (one optimizer step).
Every draw is seeded by (run seed, stream, iteration), so a run that is killed and resumed continues bit for bit.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polopt.batch import Batch, concatenate
from polopt.domain import Actor, Plan, Rollout, Task
from polopt.engine import diagnostics
from polopt.engine.behaviour import with_evaluations
from polopt.engine.diagnostics import Metrics
from polopt.engine.interrupt import Interrupt
from polopt.engine.optimization import learning_rate
from polopt.engine.ranks import Ranks
from polopt.engine.record import Record, Reporter
from polopt.engine.requirements import check_run
from polopt.engine.seeding import generator
from polopt.engine.step import Stepper
from polopt.engine.update import Update
from polopt.method import Method
from polopt.parts import Draw
from polopt.trainer_config import TrainerConfig


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
        check_run(method, actor, self.config, self.ranks)
        self.ranks.shard(actor.module)
        self.parameters = [p for p in actor.module.parameters() if p.requires_grad]
        self.optimizer = method.optimizer.build(self.parameters, self.config.lr)
        self.stepper = Stepper(actor, method, self.config, self.ranks, self.optimizer)
        self.update = Update(actor, method, self.config, self.stepper)
        self.record = Record(out, description or {}, self.config.keep, reporters, self.ranks)
        self.interrupt = Interrupt()
        self.iteration = 0
        self.before: dict[str, Any] = {}

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train to the end, or to the next interrupt.

        Args:
            resume: continue from the run folder's newest intact checkpoint.

        Returns:
            The summary: scores before and after with intervals, samples before and after, `interrupted`.
        """
        with self.record.open(self, resume) as record, self.interrupt.listening():
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
        lr = self._announce()
        with self.method.optimizer.at_rollout(self.optimizer):
            rollout = self._collect(self._draw)
            metrics = dict(rollout.metrics) | diagnostics.describe_rollout(
                rollout.batch, self.task.reward_names
            )
            started = time.perf_counter()
            batch = self._prepare(rollout.batch, self._draw)
        metrics |= diagnostics.describe_advantages(batch) | {"time/prepare": time.perf_counter() - started}
        started = time.perf_counter()
        metrics |= self.update(batch, self._draw, self._second_rollout)
        metrics |= {"lr": lr, "updates/skipped": float(self.stepper.guard.skipped)}
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
        guard = self.stepper.guard
        model, optimizer = self.ranks.full_state(self.actor.module, self.optimizer)
        return {
            "iteration": self.iteration,
            "model": model,
            "optimizer": optimizer,
            "method": dict(self.method.state_dict()),
            **self.update.state_dict(),
            "task": self.task.state_dict(),
            "trainer": {"before": self.before, "skipped": guard.skipped, "in_a_row": guard.in_a_row},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.iteration = state["iteration"]
        self.ranks.load_full_state(self.actor.module, self.optimizer, state["model"], state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.update.load_state_dict(state)
        self.task.load_state_dict(state["task"])
        self.before = state["trainer"]["before"]
        guard = self.stepper.guard
        guard.skipped, guard.in_a_row = state["trainer"]["skipped"], state["trainer"]["in_a_row"]

    def _announce(self) -> float:
        """Tell the optimizer and the parts how far the run is; returns the learning rate."""
        c = self.config
        lr = learning_rate(c.lr, c.lr_schedule, c.lr_warmup, self.iteration, c.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for part in self.method.parts:
            part.progress, part.learning_rate = self.iteration / max(1, c.iterations - 1), lr
        return lr

    def _stopped(self) -> bool:
        """Whether any rank was told to stop."""
        return bool(self.ranks.sum(torch.tensor(self.interrupt.asked)))

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
        """A plan carried out by all ranks; each has all of it afterwards."""
        with self.ranks.full_parameters():
            mine = self.actor.rollout(self.task, plan.part(self.ranks.rank, self.ranks.world), draws)
        names = sorted(mine.metrics)
        totals = self.ranks.sum(torch.tensor([mine.metrics[n] for n in names], dtype=torch.float64))
        return Rollout(
            self.ranks.gather(mine.batch), dict(zip(names, totals.tolist(), strict=True)), mine.samples
        )

    def _prepare(self, batch: Batch, draw: Draw) -> Batch:
        """The batch with all that its losses read: evaluations of other policies, advantages, weights, signals."""
        batch = with_evaluations(batch, self.actor, self.method, self.config, self.ranks)
        return self.method.prepare(batch, draw)

    def _second_rollout(self) -> Batch:
        """Another rollout of the iteration, at the present parameters and from streams of its own."""

        def draw(stream: str) -> torch.Generator:
            return self._draw(f"second {stream}")

        return self._prepare(self._collect(draw).batch, draw)
