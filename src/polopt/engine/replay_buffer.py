"""Decisions kept for replay: a ring of the newest ones, in memory that is claimed as it fills."""

from typing import Any

import torch
from torch import Tensor

from polopt.batch import Batch


class ReplayBuffer:
    """The newest `capacity` decisions, each as a row of its own.

    Args:
        capacity: decisions kept; an older one makes room for each further one.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen = 0
        """Decisions added so far."""
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, decisions: Batch) -> None:
        """Keep decisions, rows of [D, 1], of the same fields at every call."""
        count = len(decisions)
        place = torch.arange(self.seen, self.seen + count)[-self.capacity :] % self.capacity
        for path, tensor in decisions.to_tensors().items():
            column = self._columns.setdefault(path, tensor.new_empty(self.capacity, *tensor.shape[1:]))
            column[place] = tensor[-self.capacity :]
        self.seen += count

    def draw(self, count: int, draws: torch.Generator) -> Batch:
        """Decisions [count, 1] drawn uniformly with replacement."""
        rows = torch.randint(len(self), (count,), generator=draws)
        return Batch.from_tensors(
            {path: column.index_select(0, rows) for path, column in self._columns.items()}
        )

    def state_dict(self) -> dict[str, Any]:
        """What was added and is still there."""
        return {
            "seen": self.seen,
            "columns": {path: column[: len(self)] for path, column in self._columns.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, with the same capacity."""
        self.seen = state["seen"]
        self._columns = {}
        for path, kept in state["columns"].items():
            self._columns[path] = kept.new_empty(self.capacity, *kept.shape[1:])
            self._columns[path][: len(kept)] = kept
