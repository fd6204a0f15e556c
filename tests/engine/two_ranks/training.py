"""Whole training runs on several ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.engine.ranks import Ranks
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import ppo
from polopt.miniature import SumModActor, SumModTask
from polopt.parts import Surrogate
from polopt.trainer import Trainer, TrainerConfig
from tests.engine.test_gradient import assert_same

ALONE = Ranks()


class Spread(Surrogate):
    """A policy gradient divided by the spread of the minibatch's ratios."""

    coupling = "batch"

    def forward(self, evaluation: Evaluation, batch: Batch) -> Tensor:
        assert batch.loss_weight is not None and batch.advantages is not None
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return -(batch.loss_weight * batch.advantages * ratio).sum() / (1 + ratio[batch.mask].std())


def trainer(ranks: Ranks, coupled: bool, out: Path | None = None, iterations: int = 4) -> Trainer:
    task: Any = SumModTask()
    actor: Any = SumModActor(task, rows=4)
    method = Method(advantage=GroupStandardized(), surrogate=Spread()) if coupled else ppo()
    sizes: dict[str, Any] = {"prompts": 5, "rollouts": 3, "epochs": 2, "minibatches": 2}
    config = TrainerConfig(iterations=iterations, lr=0.01, **sizes)
    return Trainer(actor, task, method, config, out=out, ranks=ranks)


def numbers(metrics: dict[str, float]) -> dict[str, Tensor | None]:
    kept = {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in kept.items()}


def same_training(ranks: Ranks) -> None:
    """Iterations and scores of a trainer on `ranks` are those of a trainer alone."""
    for coupled in (True, False):
        run, alone = trainer(ranks, coupled), trainer(ALONE, coupled)
        for _ in range(3):
            assert_same(numbers(run.iterate()[0]), numbers(alone.iterate()[0]), 1e-8)
        found, expected = run.score(), alone.score()
        assert {**found, "samples": 0} == {**expected, "samples": 0}
        model = run.state_dict()["model"]
        if ranks.is_main:
            assert_same(model, dict(alone.actor.module.state_dict()), 1e-8)


def same_after_resume(ranks: Ranks) -> None:
    """A run that stops after two iterations and goes on is bit for bit the one that did not stop."""
    name = ranks.sharding
    whole = trainer(ranks, True, Path(name, "whole"))
    whole.run()
    trainer(ranks, True, Path(name, "stopped"), iterations=2).run()
    ranks.barrier()
    resumed = trainer(ranks, True, Path(name, "stopped"))
    resumed.run(resume=True)
    first, second = whole.state_dict(), resumed.state_dict()
    assert first["iteration"] == second["iteration"] == 4
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    ranks.barrier()
