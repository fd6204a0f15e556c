"""Steps of environments side by side, cut into trajectories: [S, E] records become rows [N, T]."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


@dataclass
class Recording:
    """What E environments did in S steps, step by step."""

    columns: dict[str, list[Array]] = field(default_factory=dict)
    """[E, ...] of each step, by name."""
    row: list[Array] = field(default_factory=list)
    """Row of the trajectory that each step belongs to; -1: none."""

    def add(self, row: Array, **values: Array) -> None:
        """Record a step of all environments."""
        self.row.append(row)
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)

    def rows(self, count: int) -> "Rows":
        """The trajectories 0 to `count` - 1; each one's steps are in the order of time."""
        row = np.stack(self.row)
        taken = row >= 0
        time, lane = np.nonzero(taken)
        order = np.argsort(row[time, lane], kind="stable")
        time, lane = time[order], lane[order]
        number = row[time, lane]
        lengths = np.bincount(number, minlength=count)
        begins = np.cumsum(lengths) - lengths
        column = np.arange(len(number)) - np.repeat(begins, lengths)
        shape = (count, int(lengths.max(initial=0)))
        mask = np.zeros(shape, dtype=bool)
        mask[number, column] = True
        found = {}
        for name, values in self.columns.items():
            stacked = np.stack(values)
            padded = np.zeros((*shape, *stacked.shape[2:]), dtype=stacked.dtype)
            padded[number, column] = stacked[time, lane]
            found[name] = torch.from_numpy(padded)
        return Rows(torch.from_numpy(mask), found)


@dataclass(frozen=True)
class Rows:
    """Trajectories of different lengths."""

    mask: Tensor
    columns: dict[str, Tensor]
    """[N, T, ...] by name."""

    def without_empty(self) -> "tuple[Rows, Tensor]":
        """The trajectories that have steps, and their numbers."""
        kept = self.mask.any(-1).nonzero()[:, 0]
        return Rows(self.mask[kept], {name: column[kept] for name, column in self.columns.items()}), kept


class EpisodeTotals:
    """Running sums over the episode of each of E environments, by name.

    Args:
        count: E.
        sums: those so far, [E] each.
    """

    def __init__(self, count: int, sums: dict[str, Array] | None = None) -> None:
        self._count = count
        self.sums = sums or {}

    def add(self, name: str, values: Array, decay: float = 1.0) -> Array:
        """decay * sum + values, the sum from now on."""
        self.sums[name] = decay * self.sums.get(name, np.zeros(self._count)) + values
        return self.sums[name]

    def clear(self, which: Array) -> None:
        """Begin anew where `which` [E]."""
        self.sums = {name: np.where(which, 0.0, total) for name, total in self.sums.items()}


def noise_of(distribution: Any, draws: list[np.random.Generator], steps: int) -> Array:
    """The noise [S, E, D] of some steps in E lanes, each from draws of its own."""
    return np.stack([distribution.noise((steps,), each) for each in draws], 1)


class Noise:
    """The noise that actions are drawn with: a stream for each of E lanes, by a key of its own.

    Args:
        distribution: of the actions.
        keys: integers for each lane.
        chunk: steps drawn at once.
    """

    def __init__(self, distribution: Any, keys: list[tuple[int, ...]], chunk: int) -> None:
        self._distribution, self._chunk = distribution, chunk
        self._draws = [np.random.default_rng(key) for key in keys]
        self._ahead = noise_of(distribution, self._draws, chunk)
        self._at, self._lanes = np.zeros(len(keys), dtype=np.int64), np.arange(len(keys))

    def renew(self, lane: int, key: tuple[int, ...]) -> None:
        """Begin another stream in a lane."""
        self._draws[lane] = np.random.default_rng(key)
        self._refill(lane)

    def next(self) -> Tensor:
        """[E, D] for the next step."""
        if self._at.max() == self._chunk:
            for lane in np.nonzero(self._at == self._chunk)[0].tolist():
                self._refill(lane)
        found = self._ahead[self._at, self._lanes]
        self._at += 1
        return torch.from_numpy(found)

    def _refill(self, lane: int) -> None:
        self._ahead[:, lane] = self._distribution.noise((self._chunk,), self._draws[lane])
        self._at[lane] = 0
