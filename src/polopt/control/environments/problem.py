"""A problem written once, for N episodes at a time, and the two Gymnasium environments that run it.

Each episode has its own generator: the start is drawn from it at the reset, the noise of all its decisions at the first
one. So episode i of a vector environment that is reset with `seed` is bit for bit the episode of the single environment
that is reset with `seed + i`, and who replaces `np_random` after a reset gets another course from the same start.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from polopt.errors import ConfigError, MissingExtraError

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.error import InvalidAction, ResetNeeded
    from gymnasium.utils import seeding
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise MissingExtraError('environments need gymnasium: pip install "polopt[control]"') from error

State = dict[str, np.ndarray]
"""What an episode remembers, arrays [N, ...] by name."""


class Outcome(NamedTuple):
    """What came of one decision in each of N episodes."""

    reward: Float[np.ndarray, " N"]
    terminated: Bool[np.ndarray, " N"]
    """The episode ended by itself, before the horizon."""
    info: dict[str, Float[np.ndarray, " N"]] = {}


class Problem(ABC):
    """Start, dynamics and rewards of N independent episodes."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    horizon: int
    """Most decisions of an episode."""
    ends_at_horizon: ClassVar[bool] = True
    """The horizon belongs to the problem (termination); False: it merely cuts the episode (truncation)."""

    def start_noise(self, generator: np.random.Generator) -> Float[np.ndarray, " k"]:
        """The randomness of a start; none."""
        return np.zeros(0)

    def noise(self, generator: np.random.Generator) -> Float[np.ndarray, "H d"]:
        """The randomness of an episode's decisions; none."""
        return np.zeros((self.horizon, 0))

    @abstractmethod
    def start(self, noise: Float[np.ndarray, "N k"]) -> State:
        """Start states."""

    @abstractmethod
    def observe(self, state: State) -> Shaped[np.ndarray, "N ..."]:
        """What the policy sees, in the dtype of the observation space. The state has the decisions made so far as `time`."""

    @abstractmethod
    def move(
        self, state: State, actions: Shaped[np.ndarray, "N ..."], noise: Float[np.ndarray, "N d"]
    ) -> Outcome:
        """Take an action in each episode: the state changes in place."""


class Episodes:
    """N episodes of a problem under way.

    Raises:
        ConfigError: a horizon below 1.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        if problem.horizon < 1:
            raise ConfigError(f"horizon = {problem.horizon}: must be at least 1")
        self.problem, self.count = problem, count
        self.state: State = {}
        self.noise: np.ndarray | None = None

    def restart(self, rows: Bool[np.ndarray, " N"], generators: Sequence[np.random.Generator]) -> None:
        """Begin new episodes in some rows, each with its own generator."""
        noise = np.stack([self.problem.start_noise(generators[row]) for row in np.flatnonzero(rows).tolist()])
        fresh = self.problem.start(noise) | {"time": np.zeros(len(noise), dtype=np.int64)}
        if not self.state:
            self.state = {name: np.repeat(array[:1], self.count, 0) for name, array in fresh.items()}
        for name, array in fresh.items():
            self.state[name][rows] = array

    def step(
        self, actions: Shaped[np.ndarray, "N ..."], generators: Sequence[np.random.Generator]
    ) -> Outcome:
        """Take an action in each episode; at the horizon of a finite problem they terminate."""
        if not self.state:
            raise ResetNeeded("call reset before the first step")
        time = self.state["time"]
        for row in np.flatnonzero(time == 0).tolist():
            drawn = self.problem.noise(generators[row])
            if self.noise is None:
                self.noise = np.zeros((self.count, *drawn.shape))
            self.noise[row] = drawn
        assert self.noise is not None
        noise = self.noise[np.arange(self.count), np.minimum(time, self.problem.horizon - 1)]
        outcome = self.problem.move(self.state, checked(actions, self.problem.action_space), noise)
        time += 1
        ended = (time >= self.problem.horizon) & self.problem.ends_at_horizon
        return outcome._replace(terminated=outcome.terminated | ended)

    def truncated(self, limit: int | None) -> Bool[np.ndarray, " N"]:
        """Which episodes are cut: at `limit` decisions, or at a horizon that is not the problem's own."""
        time = self.state["time"]
        cut = (time >= self.problem.horizon) & (not self.problem.ends_at_horizon)
        return cut if limit is None else cut | (time >= limit)

    def observe(self) -> Shaped[np.ndarray, "N ..."]:
        """What the policy sees."""
        return self.problem.observe(self.state)


def checked(actions: Any, space: spaces.Space[Any]) -> np.ndarray:
    """Actions as an array: integers in range, or numbers clipped to the bounds.

    Raises:
        InvalidAction: an integer out of range, a number that is not finite, or arrays of another shape.
    """
    actions = np.asarray(actions)
    if actions.shape[1:] != space.shape:
        raise InvalidAction(f"actions: shape {actions.shape}, needs (episodes, *{space.shape})")
    if isinstance(space, spaces.Discrete):
        if actions.dtype.kind not in "iu" or ((actions < 0) | (actions >= space.n)).any():
            raise InvalidAction(f"action = {actions}: not in 0..{space.n - 1}")
        return actions.astype(np.int64)
    if not np.isfinite(actions).all():
        raise InvalidAction(f"action = {actions}: not finite")
    assert isinstance(space, spaces.Box)
    return np.clip(actions.astype(np.float64), space.low, space.high)


class ProblemEnv(gymnasium.Env[Any, Any]):
    """One episode at a time. Keyword arguments are the problem's."""

    metadata: dict[str, Any] = {"render_modes": []}
    problem_class: ClassVar[type[Problem]]

    def __init__(self, render_mode: str | None = None, **options: Any) -> None:
        self.problem, self.render_mode = self.problem_class(**options), render_mode
        self.observation_space, self.action_space = self.problem.observation_space, self.problem.action_space
        self._episodes, self._over = Episodes(self.problem, 1), False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """A new episode; `options` has no keys."""
        super().reset(seed=seed)
        self._episodes.restart(np.ones(1, dtype=bool), [self.np_random])
        self._over = False
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One decision.

        Raises:
            ResetNeeded: before the first reset, or after the end of the episode.
            InvalidAction: out of range or not finite.
        """
        if self._over:
            raise ResetNeeded("the episode has ended: call reset")
        outcome = self._episodes.step(np.asarray(action)[None], [self.np_random])
        info = {name: float(value[0]) for name, value in outcome.info.items()}
        ended, cut = bool(outcome.terminated[0]), bool(self._episodes.truncated(None)[0])
        self._over = ended or cut
        return self._observation(), float(outcome.reward[0]), ended, cut and not ended, info

    def _observation(self) -> Any:
        observed = self._episodes.observe()[0]
        return observed if isinstance(observed, np.ndarray) else np.int64(observed)


class ProblemVectorEnv(VectorEnv[Any, Any, np.ndarray]):
    """N episodes at a time, batched natively; the three autoreset modes of Gymnasium.

    Args:
        num_envs: N.
        max_episode_steps: an earlier end by truncation.
        autoreset_mode: what happens after the end of an episode.
        render_mode: None, there is nothing to render.
        **options: the problem's.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
    problem_class: ClassVar[type[Problem]]

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.problem, self.num_envs, self.render_mode = self.problem_class(**options), num_envs, render_mode
        self.autoreset_mode, self.limit = AutoresetMode(autoreset_mode), max_episode_steps
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        self.single_observation_space = self.problem.observation_space
        self.single_action_space = self.problem.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes = Episodes(self.problem, num_envs)
        self._generators: list[np.random.Generator] = []
        self._done = np.zeros(num_envs, dtype=bool)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """New episodes in all rows, or in those of `options["reset_mask"]`.

        Args:
            seed: seed of row 0, with seed + i for row i; or one seed for each row. None goes on with the generators.
            options: `reset_mask` [N], which rows begin anew.
        """
        rows = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        seeds = [seed] * self.num_envs if seed is None else seed
        if isinstance(seeds, int | np.integer):
            seeds = [int(seeds) + i for i in range(self.num_envs)]
        seeds = list(seeds)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: {len(seeds)} seeds for {self.num_envs} episodes")
        if not self._generators:
            self._generators = [seeding.np_random(s)[0] for s in seeds]
        else:
            for row in np.flatnonzero(rows):
                if seeds[row] is not None:
                    self._generators[row] = seeding.np_random(seeds[row])[0]
        self._episodes.restart(rows, self._generators)
        self._done = self._done & ~rows
        return self._episodes.observe(), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision in each row; what is done begins anew by the autoreset mode.

        Raises:
            ResetNeeded: before the first reset, or, without autoreset, after the end of an episode.
            InvalidAction: out of range or not finite.
        """
        if self.autoreset_mode == AutoresetMode.DISABLED and self._done.any():
            raise ResetNeeded("episodes have ended: reset them with options={'reset_mask': ...}")
        before, stale = self._done, self._done.any()
        outcome = self._episodes.step(actions, self._generators)
        truncated = self._episodes.truncated(self.limit) & ~outcome.terminated
        reward, terminated = np.where(before, 0.0, outcome.reward), outcome.terminated & ~before
        truncated &= ~before
        self._done = terminated | truncated
        info = _masked_info(outcome.info, ~before)
        if stale:
            self._episodes.restart(before, self._generators)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._done.any():
            info = self._restart_same_step(info)
        return self._episodes.observe(), reward, terminated, truncated, info

    def _restart_same_step(self, info: dict[str, Any]) -> dict[str, Any]:
        final = np.empty(self.num_envs, dtype=object)
        observed = deepcopy(self._episodes.observe())
        for row in np.flatnonzero(self._done):
            final[row] = observed[row]
        going = {
            name: value & ~self._done if name.startswith("_") else np.where(self._done, 0.0, value)
            for name, value in info.items()
        }
        last = _masked_info({n: v for n, v in info.items() if not n.startswith("_")}, self._done)
        self._episodes.restart(self._done, self._generators)
        self._done, done = np.zeros_like(self._done), self._done
        return going | {"final_obs": final, "_final_obs": done, "final_info": last, "_final_info": done}


def _masked_info(info: dict[str, np.ndarray], rows: Bool[np.ndarray, " N"]) -> dict[str, Any]:
    """Gymnasium's form: an array by name, and under `_name` in which rows it means something."""
    masked = {name: np.where(rows, value, 0.0) for name, value in info.items()}
    return masked | {f"_{name}": rows.copy() for name in info}
