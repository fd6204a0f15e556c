"""Environments stepped together, with resets that are asked for: no transition is ever made up.

Environments that are stepped one after the other never reset themselves; a native implementation that resets itself at
the step after an episode's end has that step marked as not real.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from polopt.errors import ConfigError, MissingExtraError, PoloptError

Array = np.ndarray


class Transition(NamedTuple):
    """What one step of all environments gave, [E, ...]."""

    observation: Array
    """After the step: an episode's last one where it ended."""
    reward: Array
    terminated: Array
    truncated: Array
    real: Array
    """False where the step was an automatic reset."""
    info: dict[str, Any] | list[dict[str, Any]]
    """Of all environments, or of each."""

    @property
    def ended(self) -> Array:
        """Where the step ended an episode."""
        return (self.terminated | self.truncated) & self.real

    def reported(self, name: str) -> Array:
        """A number of `info`, float64 [E]; 0 where an environment does not report it.

        Raises:
            KeyError: none does.
        """
        if isinstance(self.info, dict):
            return np.asarray(self.info[name], dtype=np.float64)
        if not any(name in info for info in self.info):
            raise KeyError(name)
        return np.array([info.get(name, 0.0) for info in self.info], dtype=np.float64)


class VectorEnvironments:
    """`count` copies of an environment.

    Args:
        env: Gymnasium id.
        count: copies.
        native: use the environment's own vectorised implementation.
        options: of the environment.
        wrappers: around each copy, in order; not with `native`.

    Raises:
        ConfigError: there is no such environment, its options do not fit, or its observations are not supported.
        MissingExtraError: Gymnasium is not installed.
    """

    def __init__(
        self,
        env: str,
        count: int,
        native: bool = False,
        options: dict[str, Any] | None = None,
        wrappers: tuple[Callable[[Any], Any], ...] = (),
    ) -> None:
        self.env, self.count, self.native = env, count, native
        self._made = make(env, count, native, options or {}, wrappers)
        self.action_space = self._made.single_action_space
        self.observation_space = self._made.single_observation_space
        self._resets_next = np.zeros(count, dtype=bool)
        space = self.observation_space
        self._observation = np.zeros((count, *space.shape), dtype=space.dtype)

    def reset(self, seeds: list[int]) -> Array:
        """Begin episodes everywhere; a native implementation is seeded by the first."""
        if not self.native:
            return self.restart(np.ones(self.count, dtype=bool), seeds)
        self._resets_next[:] = False
        return self._made.reset(seed=seeds[0])[0]

    def restart(self, which: Array, seeds: list[int]) -> Array:
        """Begin episodes where `which` [E]; returns the observations of all. Native ones do so by themselves."""
        self._observation = self._observation.copy()
        for lane in np.nonzero(which)[0].tolist():
            self._observation[lane], _ = self._made.envs[lane].reset(seed=seeds[lane])
        return self._observation

    def step(self, actions: Array) -> Transition:
        """One step of each."""
        if self.native:
            observation, reward, terminated, truncated, info = self._made.step(actions)
            made = Transition(observation, reward, terminated, truncated, ~self._resets_next, info)
            self._resets_next = made.ended
            return made
        observation, reward = np.empty_like(self._observation), np.empty(self.count)
        terminated, truncated = np.empty((2, self.count), dtype=bool)
        infos: list[dict[str, Any]] = []
        for lane, (env, action) in enumerate(zip(self._made.envs, actions, strict=True)):
            observation[lane], reward[lane], terminated[lane], truncated[lane], info = env.step(action)
            infos.append(info)
        self._observation = observation
        return Transition(observation, reward, terminated, truncated, ~self._resets_next, infos)

    def reseed(self, number: int, seed: int) -> None:
        """Give the dynamics of one environment, after its reset, a randomness of their own."""
        self._made.envs[number].unwrapped.np_random = np.random.default_rng(seed)

    def replay(self, seeds: list[int], actions: list[Array], expected: Array) -> Array:
        """Bring episodes back to where they were: reset by seed, and the actions since.

        Raises:
            PoloptError: the observations are others than `expected`.
        """
        observation = self.reset(seeds).copy()
        for number, made in enumerate(actions):
            for action in made:
                observation[number] = self._made.envs[number].step(action)[0]
        if not np.array_equal(observation, expected):
            raise PoloptError(
                f"task = {self.env!r}: repeating an episode's actions led elsewhere, so its simulator is not "
                "deterministic; train with control.restore = 'reset'"
            )
        return observation

    def close(self) -> None:
        """Release the environments."""
        self._made.close()


def make(
    env: str,
    count: int,
    native: bool,
    options: dict[str, Any],
    wrappers: tuple[Callable[[Any], Any], ...] = (),
) -> Any:
    """A vector environment with one-dimensional or image observations; see `VectorEnvironments`."""
    gym = gymnasium()
    around = [] if native else [_flattened, *wrappers]
    mode = "vector_entry_point" if native else "sync"
    kwargs = {} if native else {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    try:
        made = gym.make_vec(env, count, mode, vector_kwargs=kwargs or None, wrappers=around, **options)
    except gym.error.Error as error:
        raise ConfigError(f"task = {env!r}: {_first_line(error)}") from error
    except ImportError as error:
        raise MissingExtraError(f"task = {env!r}: {_first_line(error)}") from error
    except TypeError as error:
        raise ConfigError(f"task_options = {options}: {_first_line(error)}") from error
    if not isinstance(made.single_observation_space, gym.spaces.Box):
        raise ConfigError(f"task = {env!r}: its native implementation gives no arrays; use 'sync'")
    if native and made.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise ConfigError(f"task = {env!r}: its native implementation resets itself at once; use 'sync'")
    return made


def gymnasium() -> Any:
    """The library, with polopt's own environments registered.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gymnasium as gym
    except ImportError:
        raise MissingExtraError(
            "domain = 'control': needs gymnasium, which is not installed: pip install \"polopt[control]\""
        ) from None
    import polopt.control.environments  # noqa: F401

    return gym


def _flattened(env: Any) -> Any:
    """Spaces other than boxes (one-hot integers, dictionaries, tuples) as flat arrays."""
    import gymnasium as gym

    return env if isinstance(env.observation_space, gym.spaces.Box) else gym.wrappers.FlattenObservation(env)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
