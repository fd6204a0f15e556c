"""A trained policy to use outside, from a run folder:

from polopt.control import load_policy

policy = load_policy("runs/mine")
action = policy(observation)
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from polopt.control.config import ControlConfig
from polopt.control.distributions import ActionDistribution, distribution_of
from polopt.control.networks import ControlNetworks
from polopt.control.off_policy_networks import OffPolicyNetworks, off_policy_config
from polopt.control.task import ControlTask, typed_options
from polopt.engine import checkpoint
from polopt.engine.run_folder import RunFolder
from polopt.errors import ConfigError


class Policy:
    """From raw observations to actions as the environment takes them; observations are normalised as in training.

    Args:
        networks: the trained ones.
        distribution: of the actions.
        shape: of an observation.
        seed: of the draws of stochastic actions.
    """

    def __init__(
        self, networks: ControlNetworks, distribution: ActionDistribution, shape: tuple[int, ...], seed: int
    ) -> None:
        self.networks, self.distribution, self.shape = networks, distribution, shape
        self._act = networks.acting()
        self._draws = np.random.default_rng(seed)

    @torch.no_grad()
    def __call__(self, observation: Any, stochastic: bool = False) -> Any:
        """The action for an observation [...], or the actions for several [E, ...].

        Args:
            observation: array or tensor, as the environment gives it.
            stochastic: draw from the distribution; otherwise its mode.

        Returns:
            What the environment takes: a number or an array for one observation, an array [E, ...] for several.

        Raises:
            ConfigError: an observation of another shape.
        """
        seen = np.asarray(observation)
        single = seen.shape == self.shape
        if not single and seen.shape[1:] != self.shape:
            raise ConfigError(
                f"observation: shape {seen.shape}, needs {self.shape} or (E, {', '.join(map(str, self.shape))}); "
                "gymnasium.wrappers.FlattenObservation makes arrays of other kinds of observations"
            )
        outputs = self._act(torch.as_tensor(seen[None] if single else seen))
        chosen = self.distribution.mode(outputs)
        if stochastic:
            noise = torch.from_numpy(self.distribution.noise((len(outputs),), self._draws))
            chosen = self.distribution.draw(outputs, noise.to(outputs))
        actions = self.distribution.to_environment(chosen.numpy())
        return actions[0] if single else actions


def load_policy(run: Path | str, iteration: int | None = None, seed: int = 0) -> Policy:
    """The policy of a run's checkpoint.

    Args:
        run: the run's folder. Its environment must be installed, for the spaces; it is made once and closed.
        iteration: of the checkpoint; by default the newest intact one.
        seed: of the draws of stochastic actions.

    Raises:
        ConfigError: there is no run in the folder, or it is of another domain.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = RunFolder(run)
    description = folder.read_config()
    if description.get("domain") != "control":
        raise ConfigError(
            f"{run}: its configuration names the domain {description.get('domain')!r}, not 'control'; runs of "
            "`polopt train` have one"
        )
    path = None if iteration is None else folder.checkpoints / f"iteration-{iteration:06d}"
    state = checkpoint.load_newest(folder.checkpoints).state if path is None else checkpoint.load(path)
    config = ControlConfig.create("control", **description["control"])
    task = ControlTask(description["task"], config, typed_options(description["task_options"]))
    task.close()
    weights, shape = state["model"], task.observation_space.shape
    has = {key.partition(".")[0] for key in weights}
    kind = OffPolicyNetworks if "critics" in has else ControlNetworks
    config = off_policy_config(config) if "critics" in has else config
    distribution = distribution_of(task.action_space, config.distribution)
    networks = kind(shape, distribution, config, frozenset(has & {"value", "median"}))
    networks.load_state_dict(weights)
    return Policy(networks.requires_grad_(False), distribution, shape, seed)
