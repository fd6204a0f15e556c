"""The loop on the miniature domain: it learns, resumes bit for bit, stops well and survives bad numbers."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import polopt
from polopt.engine.optimization import DivergedError
from polopt.engine.run_folder import read_metrics
from polopt.errors import ConfigError
from polopt.miniature import SumModActor, SumModTask

LEARN: dict[str, Any] = {
    "iterations": 40,
    "prompts": 24,
    "rollouts": 8,
    "minibatches": 4,
    "epochs": 2,
    "lr": 0.01,
}
QUICK: dict[str, Any] = {"iterations": 6, "prompts": 4, "rollouts": 4, "lr": 0.01, "checkpoint_every": 2}


def trainer(method: str = "grpo", out: Path | None = None, **config: Any) -> polopt.Trainer:
    task = SumModTask()
    return polopt.Trainer(
        SumModActor(task), task, polopt.recipe(method), polopt.TrainerConfig(**config), out=out
    )


def curve(out: Path) -> list[dict[str, Any]]:
    """Everything a run logged that does not depend on the clock."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
        for line in read_metrics(out)
    ]


@pytest.mark.parametrize("method", ["grpo", "rloo", "dr_grpo", "gspo", "cispo", "ppo"])
def test_classics_learn_from_one_sixth_to_most(method: str) -> None:
    sizes = LEARN | (
        {"iterations": 120} if method == "gspo" else {}
    )  # its clip is a thousandth of the others
    finals = [trainer(method, seed=seed, **sizes).run()["after"]["score"] for seed in range(3)]
    assert sorted(finals)[1] > 0.6, finals


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    full = trainer("ppo", whole, **QUICK)
    full.run()
    first = trainer("ppo", broken, **QUICK)
    iterate = first.iterate

    def interrupted() -> Any:
        if first.iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return iterate()

    first.iterate = interrupted  # type: ignore[method-assign]
    assert first.run()["interrupted"]
    second = trainer("ppo", broken, **QUICK)
    summary = second.run(resume=True)
    assert not summary["interrupted"]
    assert curve(whole) == curve(broken)
    for a, b in zip(full.actor.module.parameters(), second.actor.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_longer_runs_begin_like_shorter_ones(tmp_path: Path) -> None:
    trainer("grpo", tmp_path / "a", **QUICK).run()
    trainer("grpo", tmp_path / "b", **QUICK | {"iterations": 3}).run()
    assert curve(tmp_path / "a")[:3] == curve(tmp_path / "b")


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    trainer("grpo", tmp_path / "a", **QUICK | {"iterations": 1}).run()
    with pytest.raises(ConfigError, match="resume"):
        trainer("grpo", tmp_path / "a", **QUICK).run()


def poison(run: polopt.Trainer, times: int) -> None:
    """Make the first `times` losses NaN."""
    objective, left = run.method.objective, [times]

    def bad(*args: Any) -> Any:
        left[0] -= 1
        return objective(*args) * (float("nan") if left[0] >= 0 else 1.0)

    run.method.objective = bad  # type: ignore[method-assign]


def test_non_finite_loss_skips_the_update_and_is_counted() -> None:
    run = trainer("grpo", **QUICK | {"iterations": 1})
    before = [p.clone() for p in run.actor.module.parameters()]
    poison(run, 1)
    metrics, _ = run.iterate()
    assert metrics["updates/skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, run.actor.module.parameters(), strict=True))
    assert run.iterate()[0]["updates/skipped"] == 1.0
    assert all(p.isfinite().all() for p in run.actor.module.parameters())


def test_run_stops_with_a_diagnosis_after_too_many_bad_updates() -> None:
    run = trainer("grpo", **QUICK | {"patience": 2})
    poison(run, 100)
    with pytest.raises(DivergedError, match="3 updates in a row"):
        run.run()


def test_rewards_that_are_missing_cost_only_their_rows() -> None:
    run = trainer("grpo", **QUICK)
    rewards = run.task.rewards  # type: ignore[attr-defined]

    def faulty(tokens: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        values = rewards(tokens, goals)
        values[::5] = torch.nan
        values[1::5] = torch.inf
        return values

    run.task.rewards = faulty  # type: ignore[attr-defined]
    metrics, _ = run.iterate()
    assert metrics["rows"] == 16.0
    assert all(p.isfinite().all() for p in run.actor.module.parameters())


def test_all_rewards_missing_makes_no_update_and_no_error() -> None:
    run = trainer("grpo", **QUICK)
    run.task.rewards = lambda tokens, goals: torch.full((len(tokens), 1), torch.nan)  # type: ignore[attr-defined]
    metrics, _ = run.iterate()
    assert metrics["updates"] == 0.0
    assert metrics["reward/missing"] == 1.0


def test_method_defaults_fill_only_what_the_run_left_open() -> None:
    assert trainer("ppo").config.epochs == 4
    assert trainer("ppo", epochs=2).config.epochs == 2


@pytest.mark.parametrize(
    ("method", "slots", "reason"),
    [("grpo", {"minibatches": 1000}, "minibatches"), ("grpo", {"ranks": 3}, "ranks")],
)
def test_impossible_runs_are_refused_when_built(method: str, slots: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        trainer(method, **slots)


def test_critic_is_asked_for_by_name_when_the_actor_has_none() -> None:
    task = SumModTask()
    actor = SumModActor(task)
    actor.provides = actor.provides - {"value", "old_value"}
    with pytest.raises(ConfigError, match="value"):
        polopt.Trainer(actor, task, polopt.recipe("ppo"))
