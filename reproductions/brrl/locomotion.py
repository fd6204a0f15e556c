"""BPO, MDPO, PPO and sb3-contrib's TRPO on MuJoCo with equal data, networks and normalisation.

python reproductions/brrl/locomotion.py --seeds 5 --out reproductions/brrl/locomotion.json

A run makes 100,352 steps: 49 iterations of 8 environments x 256 steps. It is scored by the mean return of 10 episodes of the
policy's mode, after half of the run and after all of it. Runs that the file has are not made again.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.report.statistics import bootstrap

TASKS = ["HalfCheetah-v5", "Hopper-v5"]
ENVIRONMENTS, HORIZON, ITERATIONS, EPISODES = 8, 256, 49, 10
TRAINING: dict[str, Any] = {
    "iterations": ITERATIONS, "prompts": ENVIRONMENTS, "rollouts": 1, "epochs": 10, "minibatches": 32, "lr": 3e-4,
    "lr_schedule": "linear", "max_grad_norm": 0.5,
}  # fmt: skip
CONTROL: dict[str, Any] = {
    "horizon": HORIZON, "hidden": [64, 64], "normalize_observations": True, "normalize_rewards": True,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"method": "ppo"},
    "bpo": {"method": "bpo"},
    "mdpo": {"method": "mdpo"},
    "mdpo, constant t": {"method": "mdpo", "surrogate": "mdpo:kl=exact,schedule=constant"},
}
PEER = "trpo (sb3-contrib)"
Act = Callable[[np.ndarray], np.ndarray]
"""From an observation [1, ...] to what the environment takes, [1, ...]."""


def mean_return(task: str, act: Act) -> float:
    """Of episodes from starts that no run has trained on."""
    env, total = gymnasium.make(task), 0.0
    for episode in range(EPISODES):
        observation, over = env.reset(seed=2**31 + episode)[0], False
        while not over:
            observation, reward, ended, cut, _ = env.step(act(observation[None])[0])
            total, over = total + float(reward), ended or cut
    env.close()
    return total / EPISODES


def learn(task: str, name: str, seed: int) -> list[float]:
    """Scores of a method of this library."""
    settings = {"domain": "control", "task": task, **METHODS[name]}
    config = RunConfig.create("", **settings, trainer=TRAINING | {"seed": seed}, control=CONTROL)
    trainer: Any = build(config)
    scores = []
    for iteration in range(1, ITERATIONS + 1):
        trainer.iterate()
        if iteration in (ITERATIONS // 2, ITERATIONS):
            scores.append(mean_return(task, trainer.actor.act))
    close(trainer)
    return scores


def learn_peer(task: str, seed: int) -> list[float]:
    """Scores of TRPO with its own settings, on as many steps of as many environments."""
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    made = VecNormalize(make_vec_env(task, ENVIRONMENTS, seed=seed), gamma=0.99)
    model = TRPO("MlpPolicy", made, n_steps=HORIZON, seed=seed, device="cpu")
    scores = []
    for iterations in (ITERATIONS // 2, ITERATIONS - ITERATIONS // 2):
        model.learn(iterations * ENVIRONMENTS * HORIZON, reset_num_timesteps=not scores)
        scores.append(
            mean_return(task, lambda seen: model.predict(made.normalize_obs(seen), deterministic=True)[0])
        )
    made.close()
    return scores


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Interquartile means with 95 % intervals, and the differences to PPO with the same seed."""
    found: dict[str, Any] = {}
    for task in TASKS:
        scores = {
            name: {run["seed"]: run["scores"] for run in runs if (run["task"], run["method"]) == (task, name)}
            for name in (*METHODS, PEER)
        }
        for name, mine in ((name, mine) for name, mine in scores.items() if mine):
            row: dict[str, Any] = {"runs": len(mine)}
            for at, text in enumerate(("half", "end")):
                row[text] = vars(bootstrap([[score[at] for score in mine.values()]]))
            paired = [mine[seed][1] - scores["ppo"][seed][1] for seed in mine if seed in scores["ppo"]]
            if name != "ppo" and paired:
                row["end minus ppo"] = vars(bootstrap([paired]))
            found[f"{task}: {name}"] = row
    return found


def main() -> None:
    """Make the runs that are missing, seed by seed, and write after each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=5, help="runs of each method on each task")
    arguments.add_argument("--methods", nargs="+", choices=[*METHODS, PEER], default=[*METHODS, PEER])
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("locomotion.json"))
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="stable_baselines3")
    runs = json.loads(chosen.out.read_text())["runs"] if chosen.out.exists() else []
    made = {(run["task"], run["method"], run["seed"]) for run in runs}
    configuration = {"training": TRAINING, "control": CONTROL, "methods": METHODS, "episodes": EPISODES}
    for seed in range(chosen.seeds):
        for task in TASKS:
            for name in chosen.methods:
                if (task, name, seed) in made:
                    continue
                started = time.process_time()
                scores = learn_peer(task, seed) if name == PEER else learn(task, name, seed)
                seconds = round(time.process_time() - started)
                runs.append(
                    {"task": task, "method": name, "seed": seed, "scores": scores, "cpu_seconds": seconds}
                )
                written = {"configuration": configuration, "summary": report(runs), "runs": runs}
                chosen.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
