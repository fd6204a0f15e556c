"""polopt's PPO beside Stable-Baselines3's: same hyperparameters, environments, steps; speed and return.

    python benchmarks/control.py --out benchmarks/results/control.json

Both libraries train the same seed at the same time, one process and one thread each, so that whatever else the machine
does meets both alike. Speed is environment steps per CPU second of training. The return is that of 16 episodes by the
policy's mode after training; interquartile means over the seeds with 95 % bootstrap intervals.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENTS, STEPS, EPISODES = 8, 256, 16
SETTINGS = {"lr": 3e-4, "epochs": 10, "minibatch": 64, "gamma": 0.99, "gae_lambda": 0.95, "clip": 0.2}
TASKS = {"CartPole-v1": False, "HalfCheetah-v5": True, "Hopper-v5": True}
"""Whether observations and rewards are normalised."""


def train_polopt(env: str, seed: int, steps: int) -> dict[str, float]:
    """Train and score by polopt."""
    from polopt.cli.building import build
    from polopt.config import RunConfig

    normalized = TASKS[env]
    per_iteration = ENVIRONMENTS * STEPS
    sizes = {
        "iterations": steps // per_iteration, "prompts": ENVIRONMENTS, "rollouts": 1, "epochs": SETTINGS["epochs"],
        "minibatches": per_iteration // SETTINGS["minibatch"], "lr": SETTINGS["lr"], "max_grad_norm": 0.5,
        "score_prompts": EPISODES, "seed": seed,
    }  # fmt: skip
    control = {
        "horizon": STEPS,
        "normalize_observations": normalized,
        "normalize_rewards": normalized,
        "gamma": 0.99,
    }
    config = RunConfig.create("", domain="control", method="ppo", task=env, trainer=sizes, control=control)
    trainer = build(config)
    started, rollout = time.process_time(), 0.0
    for _ in range(sizes["iterations"]):
        metrics, _ = trainer.iterate()
        rollout += metrics["time/rollout"]
    seconds = time.process_time() - started
    return {
        "steps_per_second": sizes["iterations"] * per_iteration / seconds,
        "rollout_share": rollout / seconds,
        "return": trainer.score()["score"],
    }


def train_stable_baselines3(env: str, seed: int, steps: int) -> dict[str, float]:
    """Train and score by Stable-Baselines3."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    made: Any = make_vec_env(env, ENVIRONMENTS, seed=seed)
    if TASKS[env]:
        made = VecNormalize(made, gamma=SETTINGS["gamma"])
    model = PPO(
        "MlpPolicy", made, learning_rate=SETTINGS["lr"], n_steps=STEPS, batch_size=SETTINGS["minibatch"],
        n_epochs=SETTINGS["epochs"], gamma=SETTINGS["gamma"], gae_lambda=SETTINGS["gae_lambda"],
        clip_range=SETTINGS["clip"], max_grad_norm=0.5, vf_coef=0.5, ent_coef=0.0, seed=seed, device="cpu",
    )  # fmt: skip
    per_iteration = ENVIRONMENTS * STEPS
    total = steps // per_iteration * per_iteration
    started = time.process_time()
    model.learn(total)
    seconds = time.process_time() - started
    scored: Any = make_vec_env(env, 1, seed=seed + 1000)
    if TASKS[env]:
        scored = VecNormalize(scored, training=False, norm_reward=False)
        scored.obs_rms = made.obs_rms
    mean, _ = evaluate_policy(model, scored, EPISODES, warn=False)
    return {"steps_per_second": total / seconds, "return": float(mean)}


LIBRARIES = {"polopt": train_polopt, "stable-baselines3": train_stable_baselines3}


def side_by_side(env: str, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Both libraries at the same time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    started = {
        library: subprocess.Popen(
            [sys.executable, __file__, "--worker", library, env, str(seed), str(steps)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for library in LIBRARIES
    }
    found = {}
    for library, process in started.items():
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{library} on {env}: ended with status {process.returncode}")
        found[library] = json.loads(output.strip().splitlines()[-1])
    return found


def summarize(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of speed and its ratio, interquartile means of the returns."""
    import numpy as np

    from polopt.report.statistics import bootstrap

    summary: dict[str, Any] = {}
    for library in LIBRARIES:
        returns = np.array([run[library]["return"] for run in runs])
        interval = bootstrap([returns])
        summary[library] = {
            "steps_per_second": float(np.median([run[library]["steps_per_second"] for run in runs])),
            "return": [interval.mean, interval.low, interval.high],
        }
    ratios = [
        run["polopt"]["steps_per_second"] / run["stable-baselines3"]["steps_per_second"] for run in runs
    ]
    summary["speed_ratio"] = float(np.median(ratios))
    summary["rollout_share"] = float(np.median([run["polopt"]["rollout_share"] for run in runs]))
    return summary


def main() -> None:
    """Run the pairs and print what they give."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps of a run")
    parser.add_argument("--env", choices=list(TASKS), action="append")
    parser.add_argument("--out", type=Path, help="where the results go, JSON")
    parser.add_argument("--worker", nargs=4, metavar=("LIBRARY", "ENV", "SEED", "STEPS"), help="one run")
    options = parser.parse_args()
    if options.worker:
        library, env, seed, steps = options.worker
        print(json.dumps(LIBRARIES[library](env, int(seed), int(steps))))
        return
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", **SETTINGS}
    results |= {"steps": options.steps, "seeds": options.seeds}
    for env in options.env or TASKS:
        runs = [side_by_side(env, seed, options.steps) for seed in range(options.seeds)]
        results[env] = summarize(runs) | {"runs": runs}
        print(env, json.dumps({k: v for k, v in results[env].items() if k != "runs"}))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
