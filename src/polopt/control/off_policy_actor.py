"""A policy over bounded continuous actions, with what off-policy methods learn from replayed decisions."""

from typing import Any

import torch
from torch import Tensor

from polopt.batch import OFF_POLICY, Batch, Evaluation
from polopt.control.actor import ControlActor, of_decisions, placed
from polopt.control.collector import Collected
from polopt.control.config import ControlConfig
from polopt.control.distributions import (
    ActionDistribution,
    MeanActions,
    SquashedGaussian,
    UniformActions,
)
from polopt.control.off_policy_networks import OffPolicyNetworks, off_policy_config
from polopt.control.task import ControlTask
from polopt.errors import ConfigError

PROVIDES = OFF_POLICY | {"logp", "value", "terminated", "truncated", "step_rewards"}
"""What the actor can evaluate, and what its rollouts carry."""


class OffPolicyActor(ControlActor):
    """Squashed Gaussian with a standard deviation that depends on the state, twin critics, state value, target network.

    Log-probabilities of decisions drawn anew are densities of the action as a number in [-1, 1], so that the temperature
    means the same whatever the environment's units. `old_logp` is that of the policy, however it acted.

    Args:
        task: fixes the spaces.
        config: networks and way of acting.
        requires: what the method reads.
        seed: of the initial weights.

    Raises:
        ConfigError: the actions are discrete or unbounded, observations are images, or the configuration does not fit.
    """

    networks = OffPolicyNetworks
    module: OffPolicyNetworks
    distribution: SquashedGaussian

    def __init__(
        self, task: ControlTask, config: ControlConfig, requires: frozenset[str] = frozenset(), seed: int = 0
    ) -> None:
        _check(task, config)
        super().__init__(task, off_policy_config(config), requires | {"value"}, seed)
        space = task.action_space
        self._space = (space.low.reshape(-1), space.high.reshape(-1), space.shape, space.dtype)
        self.provides = PROVIDES

    def redraw(self, batch: Batch, draws: torch.Generator) -> Batch:
        """The decisions with the noise by which `evaluate` draws new ones in their place."""
        batch.payload["noise"] = torch.randn(batch.payload["action"].shape, generator=draws, dtype=self.dtype)
        return batch

    def after_step(self, polyak: float, mirror_steps: int = 0, **options: Any) -> None:
        """Target network and old policy follow the trained ones; see `OffPolicyNetworks.follow`."""
        self.module.follow(polyak, mirror_steps)

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current networks' view of the actions, and of those that the noise draws in their place."""
        payload, at, networks = batch.payload, of_decisions(batch.mask), self._current
        assert isinstance(networks, OffPolicyNetworks)
        state, action = at(payload["observation"]), at(payload["action"])
        features, of_value = networks.hidden(state).unbind(0)
        outputs = networks.distribution_outputs(features)
        found = {"logp": self.distribution.logp(outputs, action)}
        found |= networks.values(of_value, requires & {"value"})
        if "q" in requires:
            found["q"] = networks.critics(state, action.tanh())
        if "next_value" in requires:
            found["next_value"] = networks.target_value(at(payload["next_observation"]))
        if "squared_outputs" in requires:
            found["squared_outputs"] = 2 * outputs.square().mean(-1)
        if any(name.startswith("fresh_") for name in requires):
            found |= self._fresh(networks, state, outputs, at(payload["noise"]), requires)
        return placed(found, batch.mask)

    def _fresh(
        self,
        networks: OffPolicyNetworks,
        state: Tensor,
        outputs: Tensor,
        noise: Tensor,
        requires: frozenset[str],
    ) -> dict[str, Tensor]:
        drawn, scale = self.distribution.draw(outputs, noise), self.distribution.log_scale
        found = {}
        if "fresh_logp" in requires:
            found["fresh_logp"] = self.distribution.logp(outputs, drawn) + scale
        if "fresh_old_logp" in requires:
            found["fresh_old_logp"] = self.distribution.logp(networks.old_outputs(state), drawn) + scale
        if "fresh_q" in requires:
            found["fresh_q"] = networks.critics(state, drawn.tanh(), constant=True)
        return found

    def _behaviour(self) -> ActionDistribution:
        if self.config.uniform_start and not int(self.module.updates):
            return UniformActions(*self._space)
        return (
            MeanActions(*self._space) if self.config.collect_policy == "deterministic" else self.distribution
        )

    def _batch(self, found: Collected, group: Tensor, prompt_id: Tensor) -> Batch:
        batch = super()._batch(found, group, prompt_id)
        observation = batch.payload["observation"]
        following = observation.roll(-1, 1)
        following[torch.arange(len(batch)), batch.lengths - 1] = batch.payload["final_observation"]
        batch.payload["next_observation"] = following
        return batch


def _check(task: ControlTask, config: ControlConfig) -> None:
    bounded = not hasattr(task.action_space, "n") and hasattr(task.action_space, "low")
    if not bounded or not task.action_space.is_bounded():
        raise ConfigError(
            f"task = {task.name!r}: its actions are {task.action_space}; off-policy methods need continuous actions with "
            "bounds; choose another, --env Pendulum-v1 for instance"
        )
    if len(task.observation_space.shape) != 1:
        raise ConfigError(f"task = {task.name!r}: observes images; off-policy methods need vectors")
    if config.distribution == "gaussian":
        raise ConfigError(
            "control.distribution = 'gaussian': off-policy methods need 'squashed'; leave it at 'auto'"
        )
    for name in ("normalize_observations", "normalize_rewards"):
        if getattr(config, name):
            raise ConfigError(
                f"control.{name} = true: replayed decisions are kept as they came; off-policy methods need false"
            )
    if config.horizon == 0:
        raise ConfigError(
            "control.horizon = 0: off-policy methods need environments that live on; set 50, for instance"
        )
