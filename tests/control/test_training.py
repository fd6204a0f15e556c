"""Training in environments: it learns, it resumes exactly, and classics and batch methods run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.cli import main
from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.engine.minibatches import cuts_decisions
from polopt.trainer import Trainer

METHODS = [
    "ppo",
    "reinforce",
    "rloo",
    "grpo",
    "gspo",
    "dr_grpo",
    "capo",
    "dcpo",
    "bpo",
    "mdpo",
    "orpo-chi2",
    "bac",
    "subpo-gae",
]


def trainer(out: Path | None = None, **options: Any) -> Trainer:
    """A small run in CartPole."""
    sizes = {"iterations": 4, "prompts": 2, "rollouts": 2, "epochs": 2, "minibatches": 3, "score_prompts": 2}
    sizes |= {"checkpoint_every": 2, **options.pop("trainer", {})}
    control = {"horizon": 24, "normalize_observations": True, "normalize_rewards": True}
    control |= options.pop("control", {})
    options = {"method": "ppo", "domain": "control", **options}
    return build(RunConfig.create("", trainer=sizes, control=control, **options), out=out)


def weights(run: Trainer) -> list[torch.Tensor]:
    return [t.clone() for t in run.actor.module.state_dict().values()]


@pytest.mark.parametrize(
    "control",
    [{}, {"restore": "reset"}, {"restore": "reset", "vectorization": "native"}, {"horizon": 0}],
    ids=["replay", "reset", "native", "episodes"],
)
def test_a_resumed_run_is_the_uninterrupted_one(control: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", control=control)
    whole.run()
    first = trainer(tmp_path / "parts", control=control)
    first.iterate = stopping_after(first, 2)
    first.run()
    second = trainer(tmp_path / "parts", control=control)
    second.run(resume=True)
    for run in (whole, first, second):
        close(run)
    assert second.iteration == whole.iteration == 4
    for mine, other in zip(weights(second), weights(whole), strict=True):
        assert torch.equal(mine, other)


def test_replay_restores_an_interrupt_at_any_iteration(tmp_path: Path) -> None:
    whole = trainer()
    for _ in range(4):
        whole.iterate()
    first = trainer()
    for _ in range(3):
        first.iterate()
    second = trainer()
    second.load_state_dict(first.state_dict())
    second.iterate()
    for mine, other in zip(weights(second), weights(whole), strict=True):
        assert torch.equal(mine, other)
    for run in (whole, first, second):
        close(run)


def test_subpo_with_a_critic_is_subpo_with_another_advantage_and_the_loss_of_its_critic() -> None:
    written = {
        "method": "subpo",
        "advantage": "gae:gamma=0.99,whiten=false",
        "regularizers": ["value:coef=1"],
    }
    runs = [
        trainer(task="polopt/PointCoverage-v0", task_options={"horizon": 12}, **slots)
        for slots in ({"method": "subpo-gae"}, written)
    ]
    for run in runs:
        run.iterate()
        assert "old_value" in run.method.requires and run.actor.horizon == 24
    for mine, other in zip(*map(weights, runs), strict=True):
        assert torch.equal(mine, other)
    for run in runs:
        close(run)


def stopping_after(run: Trainer, iterations: int) -> Any:
    """The run's `iterate`, which asks for a stop like Ctrl-C does."""
    iterate = run.iterate

    def stopping() -> Any:
        found = iterate()
        if run.iteration == iterations:
            run.interrupt.asked = True
        return found

    return stopping


@pytest.mark.parametrize("method", METHODS)
def test_methods_run(method: str) -> None:
    whole_episodes = method not in ("ppo", "bpo", "orpo-chi2", "bac")
    control = {"horizon": 0} if whole_episodes else {}
    sizes = {"minibatches": 1, "epochs": 1} if method == "bac" else {}
    run = trainer(method=method, control=control, trainer={"iterations": 2, **sizes})
    before = weights(run)
    metrics, _ = run.iterate()
    run.iterate()
    close(run)
    assert all(value == value for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


@pytest.mark.parametrize("surrogate", ["mhpo", "etr", "r2vpo", "cispo", "gspo", "mdpo:kl=exact"])
def test_surrogates_take_the_place_of_ppos(surrogate: str) -> None:
    """With the sizes of PPO's recipe: 32 minibatches of decisions, or as many as there are trajectories."""
    config = RunConfig.create(
        "", domain="control", method="ppo", surrogate=surrogate, control={"horizon": 24}
    )
    run = build(config)
    assert run.config.minibatches == (32 if cuts_decisions(run.actor, run.method) else 8)
    run.iterate()
    close(run)


@pytest.mark.parametrize(
    ("env", "distribution"),
    [
        ("Pendulum-v1", "auto"),
        ("Pendulum-v1", "squashed"),
        ("polopt/RandomWalk-v0", "auto"),
        ("polopt/LQR-v0", "auto"),
    ],
)
def test_action_spaces(env: str, distribution: str) -> None:
    run = trainer(task=env, control={"distribution": distribution})
    metrics, _ = run.iterate()
    close(run)
    assert metrics["rows"] >= 4


def test_images_are_seen_by_a_convolution(tmp_path: Path) -> None:
    import gymnasium as gym
    import numpy as np

    class Picture(gym.Env[np.ndarray, int]):
        observation_space = gym.spaces.Box(0, 255, (24, 24, 3), dtype=np.uint8)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            return self.np_random.integers(0, 255, (24, 24, 3), dtype=np.uint8), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
            return self.np_random.integers(0, 255, (24, 24, 3), dtype=np.uint8), 1.0, False, False, {}

    gym.register("Picture-v0", Picture, max_episode_steps=8)
    run = trainer(task="Picture-v0", control={"normalize_observations": False, "horizon": 12})
    run.iterate()
    close(run)


def test_ppo_balances_the_pole() -> None:
    """Returns rise from about 20 to well above 100 in 24,000 steps."""
    control = {"horizon": 256, "normalize_observations": False, "normalize_rewards": False}
    sizes = {"iterations": 12, "prompts": 8, "rollouts": 1, "epochs": 4, "minibatches": 8, "lr": 2e-3}
    run = trainer(control=control, trainer={**sizes, "score_prompts": 8})
    before = run.score()["score"]
    for _ in range(12):
        run.iterate()
    after = run.score()["score"]
    close(run)
    assert before < 60
    assert after > 120


def test_the_command_line_trains_an_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    sizes = [
        "--iterations",
        "2",
        "--horizon",
        "32",
        "--score-prompts",
        "2",
        "--minibatches",
        "2",
        "--epochs",
        "1",
    ]
    flags = ["--domain", "control", "--method", "ppo", "--env", "CartPole-v1", "--surrogate", "mhpo", *sizes]
    assert main(["train", *flags, "--out", out, "--quiet"]) == 0
    assert main(["eval", out]) == 0
    assert main(["train", "--domain", "control", "--env", "CartPoel-v1"]) == 2
    assert "task = 'CartPoel-v1'" in capsys.readouterr().err


def test_a_policy_acts_outside() -> None:
    import gymnasium as gym

    run = trainer(task="Pendulum-v1")
    envs = gym.make_vec("Pendulum-v1", 3)
    observation, _ = envs.reset(seed=0)
    action = run.actor.act(observation)
    assert envs.action_space.contains(action)
    close(run)
    envs.close()
