"""The processes that share a run. One process is the case of one rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A micro-batch of this rank."""

    rows: Int[Tensor, " n"]
    counts: float
    """1, or 0 for work that only keeps the ranks in step."""


@dataclass(frozen=True)
class Ranks:
    """Data-parallel processes: all hold the same batch and the same parameters (or shards), and share the evaluation."""

    rank: int = 0
    world: int = 1

    def share(self, micro_batches: list[Int[Tensor, " n"]]) -> Iterator[Piece]:
        """This rank's micro-batches, as many on each rank."""
        for rows in micro_batches:
            yield Piece(rows, 1.0)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks."""
        return tensor

    def sum_gradients(self, actor: Any) -> None:
        """Sum the gradients of the actor's parameters over the ranks."""
