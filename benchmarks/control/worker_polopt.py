"""polopt's side, with what takes its time."""

import time
from collections import Counter
from typing import Any

import numpy as np
from settings import ENVIRONMENTS, EPISODES, MAX_GRAD_NORM, PER_ITERATION, SETTINGS, STEPS, TASKS, bound, run

from polopt.cli.building import build
from polopt.config import RunConfig
from polopt.control.vector import VectorEnvironments


def train(env: str, seed: int, iterations: int) -> dict[str, float]:
    """Train and score."""
    normalized = TASKS[env]
    sizes = {
        "iterations": iterations, "prompts": ENVIRONMENTS, "rollouts": 1, "epochs": SETTINGS["epochs"],
        "minibatches": PER_ITERATION // SETTINGS["minibatch"], "lr": SETTINGS["lr"],
        "max_grad_norm": MAX_GRAD_NORM, "score_prompts": EPISODES, "seed": seed,
    }  # fmt: skip
    control = {
        "horizon": STEPS, "normalize_observations": normalized, "normalize_rewards": normalized,
        "gamma": SETTINGS["gamma"],
    }  # fmt: skip
    config = RunConfig.create("", domain="control", method="ppo", task=env, trainer=sizes, control=control)
    trainer: Any = build(config)
    seconds: Counter[str] = Counter()
    timed(trainer, "_collect", seconds)
    timed(trainer, "update", seconds)
    timed(VectorEnvironments, "step", seconds)
    timed(VectorEnvironments, "restart", seconds)
    started = time.process_time()
    for _ in range(iterations):
        trainer.iterate()
    total = time.process_time() - started
    stepping = seconds["step"] + seconds["restart"]
    return {
        "steps_per_second": iterations * PER_ITERATION / total,
        "stepping_share": stepping / total,
        "acting_share": (seconds["_collect"] - stepping) / total,
        "update_share": seconds["update"] / total,
        "return": trainer.score()["score"],
        "bound": simulator(env, seed),
    }


def timed(owner: Any, name: str, seconds: Counter[str]) -> None:
    """Let the CPU seconds of a method be added up."""
    method = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        started = time.process_time()
        found = method(*arguments)
        seconds[name] += time.process_time() - started
        return found

    setattr(owner, name, call)


def simulator(env: str, seed: int) -> float:
    """Steps per CPU second of the same environments under random actions."""
    environments = VectorEnvironments(env, ENVIRONMENTS)
    seeds = list(range(seed, seed + ENVIRONMENTS))
    environments.reset(seeds)
    space = environments.action_space
    space.seed(seed)
    actions = [np.stack([space.sample() for _ in range(ENVIRONMENTS)]) for _ in range(64)]
    numbers = iter(range(10**9))

    def step() -> None:
        made = environments.step(actions[next(numbers) % 64])
        if made.ended.any():
            environments.restart(made.ended, seeds)

    return bound(step)


if __name__ == "__main__":
    run(train)
