"""A policy over the actions of a Gymnasium environment, with critics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor

from polopt.batch import Batch, Evaluation, zero_elsewhere
from polopt.control.collector import Collected, Collector
from polopt.control.config import ControlConfig
from polopt.control.distributions import ActionDistribution, Categorical, distribution_of
from polopt.control.networks import CRITIC, POLICY, ControlNetworks
from polopt.control.task import ControlTask
from polopt.domain import Plan, Rollout
from polopt.functional.masked import masked_sum

CRITICS = frozenset({"value", "median"})
OF_CATEGORICAL = frozenset({"score_sqnorm", "tempered_logp", "kept_logits", "kept_rows", "action_row"})
"""What can be evaluated where an action is one choice of several."""


class ControlActor:
    """Policy and critics for a task.

    A trajectory is an episode, or the part of one that lies in an iteration; a decision is an action.

    Args:
        task: fixes the spaces.
        config: networks and way of acting.
        requires: what the method reads; decides about critics, about what rollouts carry, and, if the configuration
            leaves the horizon open, whether episodes live on.
        seed: of the initial weights.
    """

    domain = "control"
    exact_sampler = True
    own_rollouts = True
    independent_decisions = True
    networks = ControlNetworks

    def __init__(
        self, task: ControlTask, config: ControlConfig, requires: frozenset[str] = frozenset(), seed: int = 0
    ) -> None:
        self.config = config
        self.distribution = distribution_of(task.action_space, config.distribution)
        self.critics = critics_of(requires)
        self.horizon = horizon(config, requires)
        self.steps_per_rollout = 0 if config.vectorization == "native" else self.horizon  # 0: they differ
        self.dense = bool(self.critics) or "step_rewards" in requires or self.horizon > 0
        self.keeps_distribution = "kl" in requires
        self.keeps_state_action = "state_action" in requires
        self.dtype = getattr(torch, config.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = self.networks(task.observation_space.shape, self.distribution, config, self.critics)
        self._initial = deepcopy(self.module).requires_grad_(False)
        self._current = self.module
        self.provides = provides(task.action_space, config, self.critics)

    @torch.no_grad()
    def rollout(self, task: ControlTask, plan: Plan, generator: torch.Generator) -> Rollout:
        """Act: the horizon's steps of environments that live on, or whole episodes; held-out ones are whole."""
        started = time.perf_counter()
        base = int(torch.randint(2**62, (), generator=generator))
        index = torch.arange(len(plan.prompt_ids)).repeat_interleave(plan.counts)
        prompts = plan.prompt_ids[index]
        behaviour = self.distribution if plan.heldout else self._behaviour()
        act, report_info = self.module.acting(), tuple(self.config.report_info)
        collector = Collector(behaviour, act, self.config.gamma, report_info)
        if self.horizon and not plan.heldout:
            found = collector.steps(task, len(index), self.horizon, base, plan.first)
            batch = self._batch(found, found.lane + plan.first, found.lane + plan.first)
        else:
            greedy = plan.heldout and self.config.score_policy == "deterministic"
            found = collector.episodes(task, prompts.tolist(), base, plan.first, plan.heldout, greedy)
            batch = self._batch(found, index, prompts)
        collected = time.perf_counter()
        if not plan.heldout:
            self._describe(batch, found)
        metrics = {
            "decisions": float(batch.mask.sum()),
            "time/rollout": collected - started,
            "time/old": time.perf_counter() - collected,
        }
        return Rollout(batch, metrics, self._samples(batch))

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current networks' view of the actions."""
        mask, payload = batch.mask, batch.payload
        at = of_decisions(mask)
        action, observation = payload["action"], payload["observation"]
        if self._current is not self.module and "raw_observation" in payload.keys():
            observation = self._current.seen(payload["raw_observation"].double()).to(self.dtype)
        encoded, critics = self._current.encode(at(observation)), requires & CRITICS
        hidden = self._current.hidden
        features, of_critics = hidden(encoded).unbind(0) if critics else (hidden.alone(POLICY)(encoded), None)
        found = {} if of_critics is None else self._current.values(of_critics, critics)
        old = at(payload["distribution"]) if "kl" in requires else None
        found |= self._of_policy(features, at(action), old, requires, options)
        return placed(found, mask)

    def micro_batches(self, batch: Batch) -> list[Int[Tensor, " n"]]:
        """Rows in pieces of at most `micro_batch` decisions, or of one row."""
        limit = max(1, self.config.micro_batch // max(1, batch.mask.shape[1]))
        rows = torch.arange(len(batch))
        return [rows] if len(rows) <= limit else list(rows.split(limit))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The initial networks."""
        self._current = self._initial
        try:
            yield
        finally:
            self._current = self.module

    def observe(self, batch: Batch) -> dict[str, float]:
        """Update what normalises observations and rewards; the means over the episodes that ended."""
        module, payload = self.module, batch.payload
        if module.observation_moments is not None:
            module.observation_moments.update(payload["raw_observation"][batch.mask])
        if module.return_moments is not None:
            module.return_moments.update(payload["discounted"][batch.mask])
        ended = payload["episode_return"].isfinite()
        metrics = {"episodes": float(ended.sum())}
        for name in ("return", "length", *self.config.report_info):
            values = payload[f"episode_{name}"][ended].double()
            if len(values):
                metrics["return" if name == "return" else f"return/{name}"] = float(values.mean())
        return metrics

    def score(self, task: ControlTask, batch: Batch) -> dict[str, float]:
        """Mean return of held-out episodes with its normal 95 % interval, and what was asked of `info`."""
        returns = batch.payload["episode_return"].double()
        half = 1.96 * float(returns.std()) / len(returns) ** 0.5 if len(returns) > 1 else 0.0
        mean = float(returns.mean())
        found = {"score": mean, "score/low": mean - half, "score/high": mean + half}
        for name in ("length", *self.config.report_info):
            found[f"score/{name}"] = float(batch.payload[f"episode_{name}"].double().mean())
        return found

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """The mode of the policy for raw observations [E, ...], as a vector environment takes it; both numpy arrays."""
        outputs = self.module.acting()(torch.as_tensor(observation))
        return self.distribution.to_environment(self.distribution.mode(outputs).numpy())

    def _behaviour(self) -> ActionDistribution:
        """How actions are drawn while it collects."""
        return self.distribution

    def _batch(self, found: Collected, group: Tensor, prompt_id: Tensor) -> Batch:
        """Rewards per decision, scaled, or one return for each trajectory."""
        rows, mask = found.rows, found.rows.mask
        count = len(mask)
        raw = rows.columns["observation"]
        payload = {
            "observation": self.module.seen(raw).to(self.dtype) if not self.module.image else raw,
            "action": rows.columns["action"],
            "final_observation": self.module.seen(found.final_observation).to(self.dtype),
            **{f"episode_{name}": total for name, total in found.episode.items()},
        }
        if self.module.observation_moments is not None:
            payload["raw_observation"] = raw
        if self.module.return_moments is not None:
            payload["discounted"] = rows.columns["discounted"]
        reward = rows.columns["reward"].double()
        if self.module.return_moments is not None:
            reward = self.module.return_moments.scale(reward)
        batch = Batch(
            mask=mask,
            old_logp=torch.zeros(mask.shape, dtype=self.dtype),
            rewards=torch.full((count, 1), torch.nan) if self.dense else masked_sum(reward, mask)[:, None],
            group=group,
            prompt_id=prompt_id,
            terminated=found.terminated,
            truncated=found.truncated,
            payload=TensorDict(payload, batch_size=[count]),
            batch_size=[count],
        )
        if self.dense:
            batch.step_rewards = reward.to(self.dtype)
        return batch

    def _describe(self, batch: Batch, found: Collected) -> None:
        """What the behaviour policy and its critics say of the trajectories."""
        exact = {"entropy"} if self.distribution.exact_entropy else set()
        batch.set_evaluated("old", self.evaluate(batch, frozenset({"logp"} | exact) | self.critics))
        encoded = self.module.encode(batch.payload["final_observation"])
        if "value" in self.critics:
            features = self.module.hidden.alone(CRITIC)(encoded)
            batch.last_value = self.module.values(features, frozenset({"value"}))["value"]
        if self.keeps_state_action:
            seen, action = batch.payload["observation"].flatten(2), batch.payload["action"]
            batch.state_action = torch.cat([seen, self.distribution.numbers(action).to(seen)], -1)
        if self.keeps_distribution:
            seen = self.module.encode(batch.payload["observation"][batch.mask])
            outputs = self.module.distribution_outputs(self.module.hidden.alone(POLICY)(seen))
            batch.payload["distribution"] = _scattered(outputs, batch.mask)

    def _of_policy(
        self, features: Tensor, action: Tensor, old: Tensor | None, requires: frozenset[str], options: Any
    ) -> dict[str, Tensor]:
        outputs = self._current.distribution_outputs(features)
        found = {"logp": self.distribution.logp(outputs, action)}
        if "entropy" in requires:
            found["entropy"] = self.distribution.entropy(outputs)
        if old is not None:
            found["kl"] = self.distribution.kl(outputs, old)
        if "features" in requires:
            found["features"] = features.detach()
        if asked := requires & OF_CATEGORICAL:
            of_choice = _of_choice(outputs.detach(), action, asked, options)
            found |= {name: of_choice[name] for name in asked}
        return found

    def _samples(self, batch: Batch) -> list[dict[str, Any]]:
        shown = [(int(row.prompt_id), row.payload) for row in batch[:3].unbind(0)]
        return [
            {
                "prompt": f"start state {start}",
                "completion": f"return {float(payload['episode_return']):.6g} in {payload['episode_length']:.0f} steps",
            }
            for start, payload in shown
        ]


def critics_of(requires: frozenset[str]) -> frozenset[str]:
    """The critics that a method reads, now or as they were."""
    return frozenset(critic for critic in CRITICS if requires & {critic, f"old_{critic}"})


def horizon(config: ControlConfig, requires: frozenset[str]) -> int:
    """Steps of environments that live on, in an iteration; 0: whole episodes."""
    if config.horizon is not None:
        return config.horizon
    return 256 if critics_of(requires) else 0


def provides(action_space: Any, config: ControlConfig, critics: frozenset[str]) -> frozenset[str]:
    """What an actor on such actions can evaluate, and the optional fields that its rollouts carry."""
    distribution = distribution_of(action_space, config.distribution)
    found = {"logp", "kl", "features", "terminated", "truncated", "step_rewards", "state_action", *critics}
    found |= {f"old_{critic}" for critic in critics}
    found |= {"last_value"} if "value" in critics else set()
    found |= {"entropy", "old_entropy"} if distribution.exact_entropy else set()
    single = isinstance(distribution, Categorical) and distribution.width == 1
    return frozenset(found) | (OF_CATEGORICAL if single else frozenset())


def _of_choice(
    logits: Float[Tensor, "D A"], action: Int[Tensor, "D 1"], asked: frozenset[str], options: dict[str, Any]
) -> dict[str, Tensor]:
    """What CAPO, COPO and DCPO ask about one choice of several; `options`: `temperature`, `kept`."""
    found = {"action_row": action[:, 0]}
    probs = logits.softmax(-1)
    found["score_sqnorm"] = 1 - 2 * probs.gather(-1, action)[:, 0] + probs.square().sum(-1)
    if "tempered_logp" in asked:
        tempered = (logits / options["temperature"]).log_softmax(-1)
        found["tempered_logp"] = tempered.gather(-1, action)[:, 0]
    kept = logits.topk(min(options.get("kept", logits.shape[-1]), logits.shape[-1]))
    return found | {"kept_logits": kept.values, "kept_rows": kept.indices}


def of_decisions(mask: Bool[Tensor, "N T"]) -> Callable[[Tensor], Tensor]:
    """Takes the decisions [D, ...] out of what a batch has of them, [N, T, ...].

    In a compiled graph, whose shapes cannot depend on the mask, D is N T: zeros stand where there is no decision.
    """
    if torch.compiler.is_compiling():
        return lambda values: zero_elsewhere(values, mask).flatten(0, 1)
    if _alone(mask):
        return lambda values: values[:, 0]
    return lambda values: values[mask]


def placed(found: dict[str, Tensor], mask: Bool[Tensor, "N T"]) -> Evaluation:
    """The evaluation [N, T, ...] of what was found of the decisions [D, ...]."""
    if torch.compiler.is_compiling():
        return Evaluation(**{name: value.unflatten(0, mask.shape) for name, value in found.items()})
    if _alone(mask):
        return Evaluation(**{name: value[:, None] for name, value in found.items()})
    return Evaluation(**{name: _scattered(value, mask) for name, value in found.items()})


def _alone(mask: Tensor) -> bool:
    """Whether each row is one decision."""
    return mask.shape[1] == 1 and bool(mask.all())


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Values of decisions [D, ...] where the batch has the decisions, [N, T, ...]."""
    return values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)
