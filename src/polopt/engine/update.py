"""An iteration's update: epochs of minibatches over its data, or steps on decisions from the replay buffer."""

from typing import Any, cast

import torch

from polopt.batch import Batch, concatenate
from polopt.domain import Actor, ReplayActor
from polopt.engine import diagnostics
from polopt.engine.behaviour import sampler_weight
from polopt.engine.diagnostics import Metrics
from polopt.engine.minibatches import cuts_decisions, minibatches
from polopt.engine.replay_buffer import ReplayBuffer
from polopt.engine.step import SecondRollout, Step, Stepper
from polopt.method import Method
from polopt.parts import Draw
from polopt.trainer_config import TrainerConfig


class Update:
    """Updates the policy on each iteration's data, and keeps the data that later updates want again.

    Args:
        actor: the policy.
        method: says whether it learns off-policy, and how minibatches may be cut.
        config: epochs, minibatches, sizes of replay.
        stepper: takes the optimizer steps.
    """

    def __init__(self, actor: Actor, method: Method, config: TrainerConfig, stepper: Stepper) -> None:
        self.actor, self.method, self.config, self.stepper = actor, method, config, stepper
        self.replayed: list[Batch] = []
        self.buffer = ReplayBuffer(config.buffer_size)

    def __call__(self, batch: Batch, draw: Draw, second_rollout: SecondRollout) -> Metrics:
        """The steps that an iteration's batch calls for; none where it is empty. Returns what they report on average.

        Args:
            batch: with advantages and weights.
            draw: the iteration's randomness.
            second_rollout: for optimizers that ask for Hessian-vector products.
        """
        if not len(batch):
            return {"updates": 0.0}
        update = self._off_policy if self.method.off_policy else self._on_policy
        return update(batch, draw, second_rollout)

    def state_dict(self) -> dict[str, Any]:
        """The data kept for later updates."""
        return {
            "replay": {str(i): batch.to_tensors() for i, batch in enumerate(self.replayed)},
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.replayed = [Batch.from_tensors(tensors) for tensors in state["replay"].values()]
        self.buffer.load_state_dict(state["buffer"])

    def _on_policy(self, batch: Batch, draw: Draw, second_rollout: SecondRollout) -> Metrics:
        """Epochs of minibatches over the batch and the data of earlier iterations that is replayed."""
        steps: list[Metrics] = []
        epochs: list[Metrics] = []
        surrogate, c = self.method.surrogate, self.config
        keep_groups = surrogate.coupling in ("group", "batch")
        replaying = bool(self.replayed)
        data = self._with_replayed(batch)
        for epoch in range(c.epochs):
            rows = list(minibatches(data.group, c.minibatches, keep_groups, draw(f"minibatches {epoch}")))
            shuffled = data.take(torch.cat(rows))
            seen: list[Step] = []
            for minibatch in shuffled.split([len(r) for r in rows]):
                minibatch.loss_weight = surrogate.loss_weights(minibatch)
                fresh = not steps and not replaying
                if step := self.stepper.take(minibatch, fresh, draw, second_rollout):
                    steps.append(step.metrics)
                    seen.append(step)
            if seen:
                evaluations = [step.evaluation for step in seen]
                epochs.append(diagnostics.describe_update(evaluations, _all_of(seen, shuffled), surrogate))
        return {"updates": float(len(steps))} | diagnostics.average(steps) | diagnostics.average(epochs)

    def _with_replayed(self, batch: Batch) -> Batch:
        """The data of this update; the batch is kept for the next ones, up to `replay` iterations in all."""
        if batch.sampler_logp is not None and not self.stepper.anchors:
            batch.weights = batch.weights * sampler_weight(batch, self.config.sampler_cap)
        data = concatenate([*self.replayed, batch])
        self.replayed = [*self.replayed, batch][max(0, len(self.replayed) + 2 - self.config.replay) :]
        return data.decisions(self.method.requires) if cuts_decisions(self.actor, self.method) else data

    def _off_policy(self, batch: Batch, draw: Draw, second_rollout: SecondRollout) -> Metrics:
        """Steps on decisions from the replay buffer, as many per decision of `batch` as `update_ratio` says."""
        actor, c = cast(ReplayActor, self.actor), self.config
        decisions = batch.decisions(self.method.requires)
        self.buffer.add(decisions)
        steps: list[Metrics] = []
        draws = draw("replay buffer")
        due = self.buffer.seen >= c.learning_starts
        for _ in range(round(c.update_ratio * len(decisions)) if due else 0):
            minibatch = actor.redraw(self.buffer.draw(c.batch_size, draws), draws)
            minibatch.loss_weight = self.method.surrogate.loss_weights(minibatch)
            if step := self.stepper.take(minibatch, False, draw, second_rollout):
                actor.after_step(**self.method.evaluation_options())
                steps.append(step.metrics | diagnostics.describe_off_policy(step.evaluation))
        return {"updates": float(len(steps)), "buffer": float(len(self.buffer))} | diagnostics.average(steps)


def _all_of(steps: list[Step], epoch: Batch) -> Batch:
    """The evaluated trajectories of an epoch's steps, one after the other."""
    if len(steps) == 1:
        return steps[0].batch
    if sum(len(step.batch) for step in steps) < len(epoch):
        return cast(Batch, torch.cat(cast(Any, [step.batch for step in steps])))
    epoch.loss_weight = torch.cat([step.batch.loss_weight for step in steps])
    return epoch
