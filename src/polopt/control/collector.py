"""Acting in environments: whole episodes from start states, or a fixed number of steps of episodes that live on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polopt.control.distributions import ActionDistribution
from polopt.control.recording import Noise, Recording, Rows
from polopt.control.task import ControlTask
from polopt.control.vector import Transition
from polopt.engine.seeding import seed_sequence

Array = np.ndarray
_CHUNK = 64
"""Steps whose noise is drawn at once for whole episodes."""


@dataclass(frozen=True)
class Collected:
    """Trajectories as they happened."""

    rows: Rows
    """Columns `observation` (as it came), `action` (as the policy stores it), `reward`, and what was asked of `info`."""
    final_observation: Tensor
    """After the last step of each, [N, ...]."""
    terminated: Tensor
    truncated: Tensor
    """[N]; neither: the episode goes on in the next iteration."""
    episode: dict[str, Tensor]
    """Sums over the whole episode, NaN where it goes on, [N]: `return`, `length`, and what was asked of `info`."""
    lane: Tensor
    """Which environment, [N]."""


class Collector:
    """Acts by a policy.

    Args:
        distribution: of the actions.
        act: from observations [E, ...] to the outputs of the policy.
        gamma: discount of the running return that reward normalisation wants.
        info: entries of the environments' `info` to record.
    """

    def __init__(
        self,
        distribution: ActionDistribution,
        act: Callable[[Tensor], Tensor],
        gamma: float,
        info: tuple[str, ...] = (),
    ) -> None:
        self.distribution, self.gamma, self.info = distribution, gamma, info
        self._act = act

    def steps(self, task: ControlTask, count: int, steps: int, base: int, first: int) -> Collected:
        """`steps` steps of `count` environments whose episodes live on.

        Args:
            task: has the environments.
            count: environments.
            steps: of each.
            base: seed of the iteration.
            first: number of the first environment among those of all ranks.
        """
        living = task.living(count, seed_sequence(base, "lane", first))
        lanes = np.arange(count)
        noise = Noise(self.distribution, [(base, first + lane) for lane in range(count)], steps)
        recording = Recording()
        row = lanes.copy()  # renumbered below: a new one for each episode that begins
        rows, lane_of, begins = count, [lanes], np.full(count, -1)
        final: dict[int, Array] = {}
        ends: dict[int, tuple[bool, bool]] = {}
        sums: dict[int, dict[str, float]] = {}
        sent = []
        for step in range(steps):
            before = living.observation
            action = self._choose(before, noise.next(), greedy=False)
            sent.append(self.distribution.to_environment(action))
            made = living.environments.step(sent[-1])
            done = (made.terminated | made.truncated) & made.real
            totals = self._totals(living.total, made)
            discounted = living.total("discounted", np.where(made.real, made.reward, 0.0), self.gamma)
            recording.add(
                np.where(made.real, row, -1), observation=before, action=action, reward=made.reward,
                discounted=discounted, **self._infos(made),
            )  # fmt: skip
            observation = made.observation
            if done.any():
                for lane in np.nonzero(done)[0].tolist():
                    final[int(row[lane])] = observation[lane].copy()
                    ends[int(row[lane])] = bool(made.terminated[lane]), bool(made.truncated[lane])
                    sums[int(row[lane])] = {name: float(total[lane]) for name, total in totals.items()}
                begins[done] = step + 1
                fresh = np.nonzero(done)[0]
                row[fresh] = rows + np.arange(len(fresh))
                rows += len(fresh)
                lane_of.append(fresh)
                observation = living.begin(done, observation)
            living.observation = observation
        if not living.environments.native:
            living.keep(np.stack(sent), begins)
        for lane in lanes.tolist():
            final[int(row[lane])] = living.observation[lane].copy()
        return self._collected(recording, rows, np.concatenate(lane_of), final, ends, sums)

    def episodes(
        self, task: ControlTask, prompt_ids: list[int], base: int, first: int, heldout: bool, greedy: bool
    ) -> Collected:
        """A whole episode from each start state.

        Args:
            task: has the environments.
            prompt_ids: start states, one entry for each episode.
            base: seed of the iteration.
            first: number of the first episode among those of all ranks.
            heldout: the start states are held-out ones.
            greedy: take the mode of the distribution.
        """
        environments = task.whole_episodes(len(prompt_ids))
        lanes = environments.count
        waiting = list(range(lanes, len(prompt_ids)))
        row = np.arange(lanes)
        seeds = [task.start_seed(prompt_ids[number], heldout) for number in range(lanes)]
        observation = environments.reset(seeds)
        noise = Noise(self.distribution, [(base, first + number) for number in range(lanes)], _CHUNK)
        for lane in range(lanes):
            environments.reseed(lane, seed_sequence(base, "dynamics", first + lane))
        recording, running = Recording(), _Totals(lanes)
        final: dict[int, Array] = {}
        ends: dict[int, tuple[bool, bool]] = {}
        sums: dict[int, dict[str, float]] = {}
        while (row >= 0).any():
            before = observation
            action = self._choose(before, noise.next(), greedy)
            made = environments.step(self.distribution.to_environment(action))
            totals = self._totals(running.add, made)
            recording.add(
                row.copy(),
                observation=before,
                action=action,
                reward=made.reward,
                discounted=running.add("discounted", made.reward, self.gamma),
                **self._infos(made),
            )
            observation = made.observation
            done = made.terminated | made.truncated
            if not done.any():
                continue
            for lane in np.nonzero(done)[0].tolist():
                if (number := int(row[lane])) >= 0:
                    final[number] = observation[lane].copy()
                    ends[number] = bool(made.terminated[lane]), bool(made.truncated[lane])
                    sums[number] = {name: float(total[lane]) for name, total in totals.items()}
                row[lane] = waiting.pop(0) if waiting else -1
                if row[lane] >= 0:
                    seeds[lane] = task.start_seed(prompt_ids[row[lane]], heldout)
            running.clear(done)
            observation = environments.restart(done, seeds)
            for lane in np.nonzero(done & (row >= 0))[0].tolist():
                environments.reseed(lane, seed_sequence(base, "dynamics", first + int(row[lane])))
                noise.renew(lane, (base, first + int(row[lane])))
        count = len(prompt_ids)
        return self._collected(recording, count, np.zeros(count, dtype=np.int64), final, ends, sums)

    def _choose(self, observation: Array, noise: Tensor, greedy: bool) -> Array:
        outputs = self._act(torch.from_numpy(observation))
        noise = noise.to(outputs)
        chosen = self.distribution.mode(outputs) if greedy else self.distribution.draw(outputs, noise)
        return chosen.numpy()

    def _totals(self, add: Callable[[str, Array], Array], made: Transition) -> dict[str, Array]:
        real = made.real
        found = {"return": made.reward, "length": np.ones(len(real)), **self._infos(made)}
        return {name: add(name, np.where(real, values, 0.0)) for name, values in found.items()}

    def _infos(self, made: Transition) -> dict[str, Array]:
        return {name: np.asarray(made.info[name], dtype=np.float64) for name in self.info}

    def _collected(
        self,
        recording: Recording,
        count: int,
        lane: Array,
        final: dict[int, Array],
        ends: dict[int, tuple[bool, bool]],
        sums: dict[int, dict[str, float]],
    ) -> Collected:
        rows, kept = recording.rows(count).without_empty()
        numbers = kept.tolist()
        ended = [ends.get(number, (False, False)) for number in numbers]
        unknown = dict.fromkeys(("return", "length", *self.info), torch.nan)
        of_episode = [sums.get(number, unknown) for number in numbers]
        return Collected(
            rows,
            torch.from_numpy(np.stack([final[number] for number in numbers])),
            torch.tensor([e[0] for e in ended]),
            torch.tensor([e[1] for e in ended]),
            {name: torch.tensor([episode[name] for episode in of_episode]) for name in unknown},
            torch.from_numpy(lane)[kept],
        )


class _Totals:
    """Running sums over the episodes of some environments."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._sums: dict[str, Array] = {}

    def add(self, name: str, values: Array, decay: float = 1.0) -> Array:
        self._sums[name] = decay * self._sums.get(name, np.zeros(self._count)) + values
        return self._sums[name].copy()

    def clear(self, which: Array) -> None:
        for total in self._sums.values():
            total[which] = 0.0
