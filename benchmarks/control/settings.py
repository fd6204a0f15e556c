"""What every library trains with, and how a worker reports."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

ENVIRONMENTS, STEPS, EPISODES = 8, 256, 16
PER_ITERATION = ENVIRONMENTS * STEPS
SETTINGS = {"lr": 3e-4, "epochs": 10, "minibatch": 64, "gamma": 0.99, "gae_lambda": 0.95, "clip": 0.2}
MAX_GRAD_NORM, VALUE_COEF = 0.5, 0.5
TASKS = {"CartPole-v1": False, "HalfCheetah-v5": True, "Hopper-v5": True}
"""Whether observations and rewards are normalised."""
READY = "ready"
"""What a worker prints before it waits for the others."""
BOUND_STEPS = 1024
"""Steps of each environment by which the simulator alone is measured."""


def run(train: Callable[[str, int, int], dict[str, float]]) -> None:
    """Train as the command line says (environment, seed, steps) and print one line of JSON."""
    import torch

    torch.set_num_threads(1)
    env, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(train(env, seed, steps // PER_ITERATION)))


def start_together() -> None:
    """Say that what precedes training is done, and wait for a line of input, which comes when all are as far."""
    print(READY, flush=True)
    sys.stdin.readline()


def bound(step: Callable[[], Any]) -> float:
    """Environment steps per CPU second, if all time went into `step`, one step of all environments."""
    started = time.process_time()
    for _ in range(BOUND_STEPS):
        step()
    return BOUND_STEPS * ENVIRONMENTS / (time.process_time() - started)


def mean_return(act: Callable[[Any], Any], env: str, seed: int) -> float:
    """Of episodes, where `act` takes an observation and gives an action that the environment takes."""
    made, returns = gym.make(env), []
    for number in range(EPISODES):
        observation, _ = made.reset(seed=seed + number)
        total, ended = 0.0, False
        while not ended:
            observation, reward, terminated, truncated, _ = made.step(act(observation))
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))
