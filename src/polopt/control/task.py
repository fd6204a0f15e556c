"""A Gymnasium environment as a task: start states, and the episodes that live on between iterations."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polopt.control.config import ControlConfig
from polopt.control.recording import EpisodeTotals
from polopt.control.vector import VectorEnvironments, make
from polopt.domain import Task
from polopt.engine.seeding import seed_sequence
from polopt.errors import ConfigError
from polopt.settings import parse_options

Array = np.ndarray
_HELDOUT = 2**31
"""Seeds of held-out start states begin here."""


class ControlTask(Task):
    """An environment with its start states.

    Args:
        env: Gymnasium id, e.g. `Hopper-v5`; `module:Id` imports a module that registers it.
        config: how it is stepped.
        options: keyword arguments of the environment.

    Raises:
        ConfigError: there is no such environment, or its spaces are not supported.
        MissingExtraError: Gymnasium is not installed.
    """

    heldout_size = 4096

    def __init__(
        self, env: str, config: ControlConfig | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self.config = config = config or ControlConfig.create("control")
        self.name, self.options = env, options or {}
        self.train_size = config.start_states
        self.reward_names: tuple[str, ...] = ("return",)
        probe = make(env, 1, config.vectorization == "native", self.options)
        self.action_space, self.observation_space = probe.single_action_space, probe.single_observation_space
        self.metadata: dict[str, Any] = probe.metadata
        probe.close()
        if len(self.observation_space.shape) not in (1, 3):
            raise ConfigError(
                f"task = {env!r}: observations of shape {self.observation_space.shape}; allowed: vectors and "
                "images"
            )
        self._whole: VectorEnvironments | None = None
        self._living: Living | None = None
        self._saved: dict[str, Any] = {}

    def whole_episodes(self, count: int) -> VectorEnvironments:
        """Environments for whole episodes: `count`, at most as many as the configuration allows."""
        count = min(count, self.config.environments)
        if self._whole is None or self._whole.count != count:
            if self._whole is not None:
                self._whole.close()
            self._whole = VectorEnvironments(self.name, count, options=self.options)
        return self._whole

    def living(self, count: int, base: int) -> "Living":
        """`count` environments whose episodes live on; begun if there are none.

        Args:
            count: environments.
            base: seed of the iteration, for the episodes that begin in it.
        """
        if self._living is None or self._living.environments.count != count:
            native = self.config.vectorization == "native"
            made = VectorEnvironments(self.name, count, native, self.options)
            self._living = Living(made, base, self._saved)
            self._saved = {}
        else:
            self._living.iterate(base)
        return self._living

    def start_seed(self, prompt_id: int, heldout: bool) -> int:
        """Seed of the reset that leads to a start state."""
        return prompt_id + (_HELDOUT if heldout else 0)

    def state_dict(self) -> dict[str, Any]:
        """Episodes under way, to be repeated; none where new ones begin at every checkpoint."""
        if self.config.restore == "reset":
            self._forget()
        return self._saved or ({} if self._living is None else self._living.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._forget()
        self._saved = state

    def close(self) -> None:
        """Release the environments."""
        self._forget()
        if self._whole is not None:
            self._whole.close()
            self._whole = None

    def _forget(self) -> None:
        if self._living is not None:
            self._living.environments.close()
        self._living, self._saved = None, {}


class Living:
    """Environments whose episodes go on from one iteration to the next.

    Args:
        environments: fresh ones.
        base: seed of the present iteration.
        state: of episodes to be repeated; empty: begin new ones.
    """

    def __init__(self, environments: VectorEnvironments, base: int, state: dict[str, Any]) -> None:
        self.environments = environments
        count = environments.count
        self.totals = EpisodeTotals(count)
        self._actions: list[list[Array]] = [[] for _ in range(count)]
        self._base, self._begun = base, 0
        if not state:
            self.seeds = [self._next_seed() for _ in range(count)]
            self.observation = environments.reset(self.seeds)
            return
        self.seeds = state["seeds"].tolist()
        totals = {name: total.numpy().copy() for name, total in state["totals"].items()}
        self.totals = EpisodeTotals(count, totals)
        lengths = state["lengths"].tolist()
        actions = np.split(state["actions"].numpy(), np.cumsum(lengths)[:-1])
        self._actions = [[made] if len(made) else [] for made in actions]
        self.observation = environments.replay(self.seeds, list(actions), state["observation"].numpy())

    def iterate(self, base: int) -> None:
        """A new iteration begins, with this seed for its episodes."""
        self._base, self._begun = base, 0

    def begin(self, ended: Array, observation: Array) -> Array:
        """Begin episodes where others ended [E]; returns the observations of all."""
        self.totals.clear(ended)
        if self.environments.native:
            return observation
        for lane in np.nonzero(ended)[0]:
            self.seeds[lane] = self._next_seed()
        return self.environments.restart(ended, self.seeds)

    def keep(self, actions: Array, begins: Array) -> None:
        """Remember an iteration's actions [S, E, ...] for a replay.

        Args:
            actions: as the environments took them.
            begins: the step at which the running episode began, [E]; -1: in an earlier iteration.
        """
        for lane, begin in enumerate(begins.tolist()):
            if begin >= 0:
                self._actions[lane] = []
            self._actions[lane].append(actions[max(0, begin) :, lane])

    def state_dict(self) -> dict[str, Any]:
        """Seeds and actions of the episodes under way, and where they led."""
        actions = [np.concatenate(made) if made else None for made in self._actions]
        some = next((a for a in actions if a is not None), np.zeros((0,)))
        filled = [some[:0] if a is None else a for a in actions]
        return {
            "seeds": torch.tensor(self.seeds),
            "lengths": torch.tensor([len(a) for a in filled]),
            "actions": _tensor(np.concatenate(filled)),
            "observation": _tensor(self.observation),
            "totals": {name: _tensor(total) for name, total in self.totals.sums.items()},
        }

    def _next_seed(self) -> int:
        self._begun += 1
        return seed_sequence(self._base, "episode", self._begun) >> 32


def typed_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of an environment as a configuration has them, with texts as numbers and booleans where they are any."""
    texts = ",".join(f"{name}={value}" for name, value in given.items() if isinstance(value, str))
    return {**given, **parse_options(texts, texts)}


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).copy())
