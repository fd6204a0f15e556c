"""Acting in environments: whole episodes from start states, or a fixed number of steps of episodes that live on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polopt.control.distributions import ActionDistribution
from polopt.control.recording import EpisodeTotals, Noise, Recording, Rows, noise_of
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
    """Columns `observation` (as it came), `action` (as the policy stores it), `reward`, `discounted` (running return)."""
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
        draws = [np.random.default_rng((base, first + lane)) for lane in range(count)]
        noise = torch.from_numpy(noise_of(self.distribution, draws, steps))
        recording, endings = Recording(), _Endings()
        row, lane_of = np.arange(count), [np.arange(count)]  # a new row for each episode that begins
        begins, sent = np.full(count, -1), []
        for step in range(steps):
            before = living.observation
            action = self._choose(before, noise[step], greedy=False)
            sent.append(self.distribution.to_environment(action))
            made = living.environments.step(sent[-1])
            totals = self._record(
                recording, np.where(made.real, row, -1), before, action, made, living.totals
            )
            living.observation = made.observation
            ended = made.ended
            if ended.any():
                lanes = np.nonzero(ended)[0]
                endings.add(row[lanes], lanes, made, totals)
                begins[lanes] = step + 1
                row[lanes] = sum(map(len, lane_of)) + np.arange(len(lanes))
                lane_of.append(lanes)
                living.observation = living.begin(ended, made.observation)
        if not living.environments.native:
            living.keep(np.stack(sent), begins)
        endings.leave(row, living.observation)
        return self._collected(recording, np.concatenate(lane_of), endings)

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
        waiting = iter(range(lanes, len(prompt_ids)))
        row = np.arange(lanes)
        seeds = [task.start_seed(prompt_ids[number], heldout) for number in range(lanes)]
        observation = environments.reset(seeds)
        noise = Noise(self.distribution, [(base, first + number) for number in range(lanes)], _CHUNK)
        for lane in range(lanes):
            environments.reseed(lane, seed_sequence(base, "dynamics", first + lane))
        recording, endings, running = Recording(), _Endings(), EpisodeTotals(lanes)
        while (row >= 0).any():
            action = self._choose(observation, noise.next(), greedy)
            made = environments.step(self.distribution.to_environment(action))
            totals = self._record(recording, row.copy(), observation, action, made, running)
            observation = made.observation
            if not made.ended.any():
                continue
            ended = np.nonzero(made.ended)[0]
            endings.add(row[ended], ended, made, totals)
            row[ended] = [next(waiting, -1) for _ in ended]
            begun = [(lane, int(row[lane])) for lane in ended.tolist() if row[lane] >= 0]
            for lane, number in begun:
                seeds[lane] = task.start_seed(prompt_ids[number], heldout)
            running.clear(made.ended)
            observation = environments.restart(made.ended, seeds)
            for lane, number in begun:
                environments.reseed(lane, seed_sequence(base, "dynamics", first + number))
                noise.renew(lane, (base, first + number))
        return self._collected(recording, np.zeros(len(prompt_ids), dtype=np.int64), endings)

    def _choose(self, observation: Array, noise: Tensor, greedy: bool) -> Array:
        outputs = self._act(torch.from_numpy(observation))
        if greedy:
            return self.distribution.mode(outputs).numpy()
        return self.distribution.draw(outputs, noise.to(outputs)).numpy()

    def _record(
        self,
        recording: Recording,
        row: Array,
        observation: Array,
        action: Array,
        made: Transition,
        totals: EpisodeTotals,
    ) -> dict[str, Array]:
        """Record a step; the sums over each episode with it."""
        earned = {"return": np.where(made.real, made.reward, 0.0), "length": made.real}
        earned |= {name: np.where(made.real, made.reported(name), 0.0) for name in self.info}
        discounted = totals.add("discounted", earned["return"], self.gamma)
        recording.add(row, observation=observation, action=action, reward=made.reward, discounted=discounted)
        return {name: totals.add(name, values) for name, values in earned.items()}

    def _collected(self, recording: Recording, lane: Array, endings: "_Endings") -> Collected:
        """The trajectories that have steps, of those that are numbered like `lane`."""
        rows, kept = recording.rows(len(lane)).without_empty()
        numbers = kept.tolist()
        flags = [endings.flags.get(number, (False, False)) for number in numbers]
        unknown = dict.fromkeys(("return", "length", *self.info), torch.nan)
        sums = [endings.sums.get(number, unknown) for number in numbers]
        return Collected(
            rows,
            torch.from_numpy(np.stack([endings.final[number] for number in numbers])),
            torch.tensor([terminated for terminated, _ in flags]),
            torch.tensor([truncated for _, truncated in flags]),
            {name: torch.tensor([of_episode[name] for of_episode in sums]) for name in unknown},
            torch.from_numpy(lane)[kept],
        )


class _Endings:
    """How trajectories ended, by their numbers; numbers below 0 are of none."""

    def __init__(self) -> None:
        self.final: dict[int, Array] = {}
        self.flags: dict[int, tuple[bool, bool]] = {}
        self.sums: dict[int, dict[str, float]] = {}

    def add(self, numbers: Array, lanes: Array, made: Transition, totals: dict[str, Array]) -> None:
        """Trajectories whose episodes ended, in some of the environments."""
        self.leave(numbers, made.observation[lanes])
        for number, lane in zip(numbers.tolist(), lanes.tolist(), strict=True):
            self.flags[number] = bool(made.terminated[lane]), bool(made.truncated[lane])
            self.sums[number] = {name: float(total[lane]) for name, total in totals.items()}

    def leave(self, numbers: Array, observation: Array) -> None:
        """Trajectories whose last step led to these observations."""
        self.final |= {
            number: seen.copy() for number, seen in zip(numbers.tolist(), observation, strict=True)
        }
