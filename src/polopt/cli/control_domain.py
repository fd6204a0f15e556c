"""The control domain on the command line: Gymnasium environments."""

import math
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from polopt.config import RunConfig
from polopt.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from polopt.cli.estimate import Estimate
    from polopt.control.actor import ControlActor
    from polopt.control.task import ControlTask
    from polopt.method import Method

_LISTED = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
"""Environments of other packages that `polopt tasks` names; any Gymnasium id will do."""


class ControlDomain:
    """Policies over the actions of Gymnasium environments."""

    units: tuple[str, ...] = ("steps",)

    def require(self, config: RunConfig) -> None:
        """Gymnasium, and settings that one process alone can have."""
        if find_spec("gymnasium") is None:
            raise MissingExtraError(
                "domain = 'control': needs gymnasium, which is not installed: pip install \"polopt[control]\""
            )
        if config.reward:
            raise ConfigError(f"reward = {config.reward[0]!r}: an environment has its own reward alone")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and config.control.restore == "replay":
            raise ConfigError(
                "control.restore = 'replay': episodes under way are repeated by one process alone; with several set 'reset'"
            )

    def provides(self) -> frozenset[str]:
        """Everything that some environment's policy can be asked for; the actor refuses what its own cannot."""
        from polopt.batch import EVALUATED

        carried = {"old_entropy", "old_value", "old_median", "last_value", "step_rewards", "state_action"}
        return EVALUATED | carried | {"terminated", "truncated"}

    def task(self, config: RunConfig) -> "ControlTask":
        """The environment."""
        from polopt.control.task import ControlTask, typed_options

        return ControlTask(config.task, config.control, typed_options(config.task_options))

    def actor(self, config: RunConfig, task: "ControlTask", method: "Method") -> "ControlActor":
        """Networks from scratch."""
        from polopt.control.actor import ControlActor
        from polopt.control.off_policy_actor import OffPolicyActor

        made = OffPolicyActor if method.off_policy else ControlActor
        return made(task, config.control, method.requires, config.trainer.seed)

    def estimate(self, config: RunConfig, task: "ControlTask", method: "Method") -> "Estimate":
        """See `polopt.cli.estimate`."""
        from polopt.cli.estimate import estimate_by_trial

        return estimate_by_trial(config, task, self.actor(config, task, method))

    def iteration_size(self, config: RunConfig, method: "Method", unit: str) -> int | None:
        """Steps of environments that live on; nobody knows those of whole episodes."""
        from polopt.control.actor import horizon

        t = config.trainer
        return t.prompts * t.rollouts * horizon(config.control, method.requires) or None

    def threshold(self, task: str) -> float:
        """The return at which the environment counts as solved."""
        from polopt.control.vector import gymnasium

        found = gymnasium().spec(task).reward_threshold
        return math.inf if found is None else float(found)

    def tasks(self) -> list[dict[str, Any]]:
        """polopt's own environments, and a few of others."""
        if find_spec("gymnasium") is None:
            return []
        from polopt.control.vector import gymnasium

        registered = gymnasium().registry
        own = sorted(name for name in registered if name.startswith("polopt/"))
        return [self._entry(name, name in registered) for name in (*own, *_LISTED)]

    @staticmethod
    def _entry(name: str, available: bool) -> dict[str, Any]:
        summary = "environment of polopt" if name.startswith("polopt/") else "Gymnasium environment"
        return {
            "spec": name,
            "kind": "gymnasium",
            "summary": summary,
            "available": available,
            "parameters": [],
        }
