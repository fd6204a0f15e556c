"""polopt's side, with what takes its time."""

import resource
import time
from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np
from settings import (
    ENVIRONMENTS,
    EPISODES,
    MAX_GRAD_NORM,
    PER_ITERATION,
    SETTINGS,
    STEPS,
    TASKS,
    bound,
    run,
    start_together,
)  # fmt: skip

from polopt.cli.building import build
from polopt.config import RunConfig
from polopt.control.vector import VectorEnvironments


def train(env: str, seed: int, iterations: int, compiled: bool = False) -> dict[str, float]:
    """Train and score. The first iteration is not timed: in it a compiled run compiles."""
    before = seconds_of_all()
    trainer: Any = build(configuration(env, seed, iterations, compiled))
    trainer.iterate()
    first = seconds_of_all() - before
    seconds: Counter[str] = Counter()
    timed(trainer, "_collect", seconds)
    timed(trainer, "update", seconds)
    timed(VectorEnvironments, "step", seconds)
    timed(VectorEnvironments, "restart", seconds)
    start_together()
    started, decisions = time.process_time(), 0.0
    for _ in range(iterations - 1):
        decisions += trainer.iterate()[0]["decisions"]
    total = time.process_time() - started
    stepping = seconds["step"] + seconds["restart"]
    return {
        "steps_per_second": decisions / total,
        "first_iteration_seconds": first,
        "later_iteration_seconds": total / (iterations - 1),
        "stepping_share": stepping / total,
        "acting_share": (seconds["_collect"] - stepping) / total,
        "update_share": seconds["update"] / total,
        "return": trainer.score()["score"],
        "bound": simulator(env, seed),
    }


def configuration(env: str, seed: int, iterations: int, compiled: bool) -> RunConfig:
    """PPO as the others run it, on the environment's own vectorised implementation where it has one."""
    normalized = TASKS[env]
    sizes = {
        "iterations": iterations, "prompts": ENVIRONMENTS, "rollouts": 1, "epochs": SETTINGS["epochs"],
        "minibatches": PER_ITERATION // SETTINGS["minibatch"], "lr": SETTINGS["lr"],
        "max_grad_norm": MAX_GRAD_NORM, "score_prompts": EPISODES, "seed": seed, "compile": compiled,
    }  # fmt: skip
    control = {
        "horizon": STEPS, "normalize_observations": normalized, "normalize_rewards": normalized,
        "gamma": SETTINGS["gamma"],
    }  # fmt: skip
    if native(env):
        control |= {"vectorization": "native", "restore": "reset"}
    return RunConfig.create("", domain="control", method="ppo", task=env, trainer=sizes, control=control)


def native(env: str) -> bool:
    """Whether the environment has a vectorised implementation of its own."""
    return gym.spec(env).vector_entry_point is not None


def seconds_of_all() -> float:
    """CPU seconds of this process and of those that it ran to the end, a compiler's for instance."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


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
    environments = VectorEnvironments(env, ENVIRONMENTS, native(env))
    seeds = list(range(seed, seed + ENVIRONMENTS))
    environments.reset(seeds)
    space = environments.action_space
    space.seed(seed)
    actions = [np.stack([space.sample() for _ in range(ENVIRONMENTS)]) for _ in range(64)]
    numbers = iter(range(10**9))

    def step() -> None:
        made = environments.step(actions[next(numbers) % 64])
        if made.ended.any() and not environments.native:
            environments.restart(made.ended, seeds)

    return bound(step)


if __name__ == "__main__":
    run(train)
