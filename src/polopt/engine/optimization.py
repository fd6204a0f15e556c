"""One optimizer step: learning rate, clipping, and what happens when a number is not finite."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from polopt.errors import PoloptError

Schedule = Literal["constant", "linear", "cosine"]


class DivergedError(PoloptError):
    """Too many updates in a row had a loss or gradient that is not finite."""


def learning_rate(lr: float, schedule: Schedule, warmup: int, iteration: int, iterations: int) -> float:
    """Learning rate of an iteration (from 0): linear warm-up over `warmup` iterations, then the schedule down to 0."""
    if iteration < warmup:
        return lr * (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, iterations - warmup)
    match schedule:
        case "constant":
            return lr
        case "linear":
            return lr * (1 - progress)
        case "cosine":
            return lr * (1 + math.cos(math.pi * progress)) / 2


@dataclass
class FiniteGuard:
    """Skips, counts and finally refuses updates that are not finite."""

    patience: int
    """Updates in a row that may be skipped."""
    skipped: int = 0
    in_a_row: int = field(default=0)

    def accepts(self, loss: float | torch.Tensor, gradient_norm: float | torch.Tensor) -> bool:
        """Whether the step may be taken.

        Raises:
            DivergedError: more than `patience` in a row could not.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.patience:
            raise DivergedError(
                f"{self.in_a_row} updates in a row were not finite (loss {float(loss)}, gradient norm "
                f"{float(gradient_norm)}): lower the learning rate or check the rewards; the last checkpoint is intact"
            )
        return False
