"""Trajectories are what happened: no step is made up, cut, or counted twice."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from polopt.control.actor import ControlActor
from polopt.control.config import ControlConfig
from polopt.control.task import ControlTask
from polopt.domain import Plan

CRITIC = frozenset({"value", "old_value"})


class Counter(gym.Env[np.ndarray, int]):
    """Counts its steps; action 1 ends the episode, and a time limit of 5 cuts it. The reward is the step's number."""

    observation_space = gym.spaces.Box(0, 100, (2,), dtype=np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.count, self.start = 0, float(self.np_random.integers(50))
        return self._seen(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._seen(), float(self.count), bool(action == 1), False, {"twice": 2.0 * self.count}

    def _seen(self) -> np.ndarray:
        return np.array([self.count, self.start], dtype=np.float32)


gym.register("Counter-v0", Counter, max_episode_steps=5)


def actor_on(config: ControlConfig, env: str = "Counter-v0") -> tuple[ControlActor, ControlTask]:
    task = ControlTask(env, config)
    return ControlActor(task, config, CRITIC), task


def roll(
    actor: ControlActor,
    task: ControlTask,
    count: int,
    seed: int = 0,
    heldout: bool = False,
    rollouts: int = 1,
) -> Any:
    plan = Plan(torch.arange(count), torch.full((count,), rollouts), heldout)
    return actor.rollout(task, plan, torch.Generator().manual_seed(seed)).batch


def test_living_episodes_are_continued_and_cut_at_the_horizon() -> None:
    actor, task = actor_on(ControlConfig.create("control", horizon=13))
    first, second = roll(actor, task, 6), roll(actor, task, 6, seed=1)
    for batch in (first, second):
        assert int(batch.mask.sum()) == 6 * 13
        seen, action = batch.payload["observation"][..., 0], batch.payload["action"][..., 0]
        for row in range(len(batch)):
            length = int(batch.lengths[row])
            steps = seen[row, :length]
            assert torch.equal(steps, steps[0] + torch.arange(length))
            assert torch.equal(batch.step_rewards[row, :length], steps + 1)
            assert not (action[row, : length - 1] == 1).any()
            last = action[row, length - 1] == 1
            assert bool(batch.terminated[row]) == bool(last)
            assert bool(batch.truncated[row]) == bool(steps[-1] == 4)
            ended = batch.terminated[row] | batch.truncated[row]
            total = batch.payload["episode_return"][row]
            expected = float((steps[-1] + 1) * (steps[-1] + 2) / 2)
            assert float(total) == expected if ended else bool(total.isnan())
    going_on = (~(first.terminated | first.truncated)).nonzero()[:, 0]
    assert len(going_on)
    for row in going_on.tolist():
        next_row = int((second.group == first.group[row]).nonzero()[0, 0])
        left_off, found = first.payload["final_observation"][row], second.payload["observation"][next_row, 0]
        assert torch.equal(left_off, found)


def test_truncation_bootstraps_and_termination_does_not() -> None:
    from polopt.methods.classics.ppo import GAE

    actor, task = actor_on(ControlConfig.create("control", horizon=40))
    batch = roll(actor, task, 4)
    advantages = GAE(gamma=0.9, gae_lambda=0.0, whiten=False)(batch)
    at = batch.lengths - 1
    rows = torch.arange(len(batch))
    last = advantages[rows, at] + batch.old_value[rows, at] - batch.step_rewards[rows, at]
    bootstrap = torch.where(batch.terminated, 0.0, 0.9 * batch.last_value)
    torch.testing.assert_close(last, bootstrap, atol=1e-5, rtol=0)
    assert batch.truncated.any() and batch.terminated.any()


@pytest.mark.parametrize("environments", [2, 3, 50])
def test_whole_episodes_do_not_depend_on_how_many_run_at_once(environments: int) -> None:
    config = ControlConfig.create("control", horizon=0, environments=environments)
    actor, task = actor_on(config)
    batch = roll(actor, task, 7, rollouts=3)
    reference, other = actor_on(ControlConfig.create("control", horizon=0, environments=7))
    expected = roll(reference, other, 7, rollouts=3)
    assert torch.equal(batch.payload["action"], expected.payload["action"])
    assert torch.equal(batch.step_rewards, expected.step_rewards)
    starts = batch.payload["observation"][:, 0].view(7, 3, 2)
    assert (starts == starts[:, :1]).all()  # a group shares its start state
    assert (batch.terminated | batch.truncated).all()


def test_the_parts_of_two_ranks_are_the_rollouts_of_one() -> None:
    config = ControlConfig.create("control", horizon=0)
    actor, task = actor_on(config)
    plan = Plan(torch.arange(4), torch.full((4,), 2))
    whole = actor.rollout(task, plan, torch.Generator().manual_seed(3)).batch
    parts = [
        actor.rollout(task, plan.part(rank, 2), torch.Generator().manual_seed(3)).batch for rank in range(2)
    ]
    lengths = torch.cat([part.lengths for part in parts])
    assert torch.equal(lengths, whole.lengths)
    assert torch.equal(torch.cat([part.prompt_id for part in parts]), whole.prompt_id)


def test_a_native_environment_loses_its_reset_steps() -> None:
    config = ControlConfig.create("control", horizon=200, vectorization="native", restore="reset")
    actor, task = actor_on(config, "CartPole-v1")
    batch = roll(actor, task, 4)
    ended = int((batch.terminated | batch.truncated).sum())
    resets = 4 * 200 - int(batch.mask.sum())
    assert ended - 4 <= resets <= ended
    assert (batch.step_rewards[batch.mask] == 1).all()


def test_what_is_asked_of_info_is_summed() -> None:
    config = ControlConfig.create("control", horizon=0, report_info=["twice"])
    actor, task = actor_on(config)
    batch = roll(actor, task, 5)
    torch.testing.assert_close(batch.payload["episode_twice"], 2 * batch.payload["episode_return"])
    assert actor.observe(batch)["return/twice"] == pytest.approx(2 * actor.observe(batch)["return"])
