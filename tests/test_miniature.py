"""The miniature domain's standard tasks: what is right, how often chance is, and runs from the command line."""

from typing import Any

import pytest
import torch

from polopt.cli.building import build, close
from polopt.cli.domains import DOMAINS
from polopt.config import configure
from polopt.domain import Plan
from polopt.errors import ConfigError
from polopt.miniature import SumModActor, SumModTask
from polopt.miniature_config import STANDARD_TASKS, standard_options


def actor(task: SumModTask, **options: Any) -> SumModActor:
    return SumModActor(task, **options)


def rollout(task: SumModTask, prompts: int, count: int, **options: Any) -> Any:
    plan = Plan(torch.arange(prompts), torch.full((prompts,), count))
    return actor(task, **options).rollout(task, plan, torch.Generator().manual_seed(0)).batch


def test_sums_must_be_right_after_each_part_that_is_asked_for() -> None:
    task = SumModTask(modulus=5, length=2, parts=2, second_reward=True)
    tokens = torch.tensor([[1, 2, 4, 1], [1, 2, 4, 0], [2, 1, 3, 2], [2, 2, 3, 1]])
    prompts = torch.tensor([3, 8, 13, 3])  # the goal is 3
    assert task.rewards(tokens, prompts).tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]


def test_parts_that_a_prompt_does_not_ask_for_do_not_count() -> None:
    task = SumModTask(modulus=5, length=2, parts=2, mixed=True)
    prompts = torch.tensor([3, 8])  # the goal is 3, in two parts and in one
    assert task.parts(prompts).tolist() == [2, 1]
    assert task.rewards(torch.tensor([[1, 2, 0, 1], [1, 2, 0, 0]]), prompts).tolist() == [[0], [1]]


def test_mixed_prompts_ask_for_all_numbers_of_parts_with_every_goal() -> None:
    task = SumModTask(modulus=4, length=2, parts=3, mixed=True, train_size=12)
    prompts = torch.arange(12)
    pairs = set(zip(task.goals(prompts).tolist(), task.parts(prompts).tolist(), strict=True))
    assert pairs == {(goal, parts) for goal in range(4) for parts in (1, 2, 3)}
    batch = rollout(task, 12, 2)
    assert (batch.mask.sum(-1) == 2 * batch.payload["parts"]).all()
    assert (batch.payload["tokens"][~batch.mask] == 0).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_chance_succeeds_as_often_as_is_said(parts: int) -> None:
    task = SumModTask(modulus=3, length=2, parts=parts)
    rewards = rollout(task, 60, 100).rewards
    expected = 3.0**-parts
    assert float(rewards.mean()) == pytest.approx(expected, abs=0.05)


def test_what_lies_outside_of_a_short_prompt_changes_nothing() -> None:
    task = SumModTask(modulus=4, length=2, parts=3, mixed=True)
    batch, policy = rollout(task, 12, 2), actor(task)
    changed = batch.clone()
    changed.payload["tokens"] = torch.where(batch.mask, batch.payload["tokens"], 3)
    names = frozenset({"logp", "entropy", "value"})
    one, other = policy.evaluate(batch, names), policy.evaluate(changed, names)
    for name in names:
        assert torch.equal(getattr(one, name)[batch.mask], getattr(other, name)[batch.mask])


def test_score_counts_completions_that_earn_every_reward() -> None:
    task = SumModTask(second_reward=True)
    batch = rollout(task, 2, 2)
    batch.rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert actor(task).score(task, batch)["score"] == 0.25


def test_held_out_completions_are_the_likeliest_or_sampled() -> None:
    task = SumModTask()
    plan = Plan(torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.int64), heldout=True)
    kinds = [
        len(actor(task, sampled_scores=sampled).rollout(task, plan, torch.Generator()).batch.payload["tokens"].unique(dim=0))
        for sampled in (False, True)
    ]  # fmt: skip
    assert kinds[0] == 1 < kinds[1]


@pytest.mark.parametrize("name", STANDARD_TASKS)
def test_standard_tasks_run_from_a_configuration(name: str) -> None:
    trainer = build(
        configure(
            {"domain": "miniature", "task": f"miniature:{name}", "trainer": {"iterations": 2, "prompts": 4}}
        )
    )
    summary = trainer.run()
    close(trainer)
    assert trainer.config.lr == 0.03 and 0 <= summary["before"]["score"] <= 0.2
    assert trainer.task.length == 2 * standard_options(name).parts


def test_domain_has_a_task_and_a_rate_of_its_own_unless_told_otherwise() -> None:
    config = configure({"domain": "miniature", "trainer": {"prompts": 4}})
    assert (config.task, config.trainer.lr, config.trainer.prompts) == ("miniature:mixed", 0.03, 4)
    config = configure({"domain": "miniature", "task": "miniature:rare", "trainer": {"lr": 0.5}})
    assert (config.task, config.trainer.lr) == ("miniature:rare", 0.5)
    assert configure({}).task == "builtin:largest"


def test_domain_promises_what_its_actor_provides() -> None:
    config = configure({"domain": "miniature", "trainer": {"iterations": 0}})
    trainer = build(config)
    close(trainer)
    assert DOMAINS["miniature"].provides() == trainer.actor.provides


def test_tasks_are_listed_with_their_options() -> None:
    found = DOMAINS["miniature"].tasks()
    assert [entry["spec"] for entry in found] == [f"miniature:{name}" for name in STANDARD_TASKS]
    rare = next(entry for entry in found if entry["spec"] == "miniature:rare")
    options = {parameter["name"]: parameter["default"] for parameter in rare["parameters"]}
    assert options["parts"] == 3 and options["mixed"] is False and options["length"] == 2


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"task": "miniature:rar"}, ["miniature:rar", "miniature:rare"]),
        ({"task": "builtin:largest"}, ["builtin:largest"]),
        ({"task_options": {"parts": 0}}, ["miniature:mixed.parts", "0"]),
        ({"task_options": {"prats": 2}}, ["prats", "parts"]),
        ({"reward": "python:a.py:f"}, ["reward"]),
    ],
)
def test_bad_tasks_are_refused(values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        build(configure({"domain": "miniature", **values}))
    assert all(name in str(found.value) for name in names)
