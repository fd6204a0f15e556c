"""Every recipe runs through the trainer, and continues bit for bit from its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

import polopt
from polopt.engine.run_folder import read_metrics
from polopt.miniature import SumModActor, SumModTask
from polopt.registry import recipe_domains

FOLLOW_THE_SHARE_DONE = ("d3s", "mdpo")
"""Their schedules follow the share of the run that is done, which is another in a shorter first part."""
SIZES: dict[str, Any] = {"prompts": 6, "rollouts": 4, "lr": 0.01, "checkpoint_every": 2}


def trainer(recipe: str, out: Path, iterations: int) -> polopt.Trainer:
    task = SumModTask(train_size=12, second_reward=True)
    config = polopt.TrainerConfig(iterations=iterations, **SIZES)
    return polopt.Trainer(SumModActor(task), task, polopt.recipe(recipe), config, out=out)


def logged(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
        for line in read_metrics(out)
    ]


EVERYWHERE = [name for name in polopt.recipes() if recipe_domains(name) is None]


@pytest.mark.parametrize("recipe", EVERYWHERE)
def test_recipe_continues_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    whole = trainer(recipe, tmp_path / "whole", 5)
    whole.run()
    trainer(recipe, tmp_path / "parts", 3).run()
    second = trainer(recipe, tmp_path / "parts", 5)
    second.run(resume=True)
    if recipe not in FOLLOW_THE_SHARE_DONE:
        assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
        for one, other in zip(whole.actor.module.parameters(), second.actor.module.parameters(), strict=True):
            assert torch.equal(one, other)
    assert sum(line["updates"] for line in logged(tmp_path / "parts")) > 0
    assert all(p.isfinite().all() for p in second.actor.module.parameters())
