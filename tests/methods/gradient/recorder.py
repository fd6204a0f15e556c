"""An actor that remembers at which parameters it was asked what."""

from typing import Any

import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.domain import Plan, Rollout
from polopt.miniature import SumModActor, SumModTask


class Recorder(SumModActor):
    """Keeps the parameters at every rollout and at every evaluation with gradient, and the tokens drawn."""

    def __init__(self, task: SumModTask) -> None:
        super().__init__(task, width=8)
        self.rolled: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def rollout(self, task: SumModTask, plan: Plan, generator: torch.Generator) -> Rollout:
        self.rolled.append(self.flat())
        found = super().rollout(task, plan, generator)
        self.drawn.append(found.batch.payload["tokens"])
        return found

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        if torch.is_grad_enabled():
            self.evaluated.append(self.flat())
        return super().evaluate(batch, requires, **options)
