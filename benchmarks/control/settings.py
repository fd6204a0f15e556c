"""What every library trains with, and how a worker reports."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

ENVIRONMENTS, STEPS, EPISODES = 8, 256, 16
PER_ITERATION = ENVIRONMENTS * STEPS
SETTINGS = {"lr": 3e-4, "epochs": 10, "minibatch": 64, "gamma": 0.99, "gae_lambda": 0.95, "clip": 0.2}
MAX_GRAD_NORM, VALUE_COEF = 0.5, 0.5
TASKS = {"CartPole-v1": False, "HalfCheetah-v5": True, "Hopper-v5": True}
"""Whether observations and rewards are normalised."""
BOUND_STEPS = 1024
"""Steps of each environment by which the simulator alone is measured."""


def run(train: Callable[[str, int, int], dict[str, float]]) -> None:
    """Train as the command line says (environment, seed, steps) and print one line of JSON."""
    import torch

    torch.set_num_threads(1)
    env, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(train(env, seed, steps // PER_ITERATION)))


def bound(step: Callable[[], Any]) -> float:
    """Environment steps per CPU second, if all time went into `step`, one step of all environments."""
    started = time.process_time()
    for _ in range(BOUND_STEPS):
        step()
    return BOUND_STEPS * ENVIRONMENTS / (time.process_time() - started)
