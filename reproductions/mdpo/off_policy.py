"""Off-policy MDPO against soft actor-critic with equal budget, and the speed of the latter.

python reproductions/mdpo/off_policy.py --seeds 5 --out reproductions/mdpo/off_policy.json
python reproductions/mdpo/off_policy.py --task HalfCheetah-v5 --seeds 5 --out reproductions/mdpo/off_policy_halfcheetah.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from run import summary

from polopt.cli.building import build, close
from polopt.config import RunConfig

SCORED_AFTER = {"Pendulum-v1": (2500, 5000, 10000, 15000), "HalfCheetah-v5": (5000, 10000, 20000)}
"""Environment steps after which a policy is judged, by task; the last ends the run."""
LEARNING_STARTS = {"Pendulum-v1": 500, "HalfCheetah-v5": 1000}
TRAINING: dict[str, Any] = {"lr": 1e-3, "score_prompts": 30}
CONTROL: dict[str, Any] = {"horizon": 50, "hidden": [64, 64], "score_policy": "stochastic"}
METHODS: dict[str, dict[str, str]] = {
    "sac": {"method": "sac"},
    "mdpo-off": {"method": "mdpo-off"},
}
REDUCED = {"method": "mdpo-off", "surrogate": "soft_mirror:temperature=0.2,inverse_step=0.2"}
"""kappa = lambda: must be soft actor-critic."""
SPEED: dict[str, int] = {"steps": 600, "warm_up": 100, "batch_size": 256, "width": 256}


def settings(task: str) -> dict[str, Any]:
    """The trainer's settings."""
    iterations = SCORED_AFTER[task][-1] // CONTROL["horizon"]
    return TRAINING | {"iterations": iterations, "learning_starts": LEARNING_STARTS[task]}


def learn(task: str, method: dict[str, str], seed: int) -> dict[str, Any]:
    """Mean return of thirty held-out episodes of the policy as it acts, by environment steps."""
    config = RunConfig.create(
        "", domain="control", task=task, trainer={**settings(task), "seed": seed}, control=CONTROL, **method
    )
    trainer = build(config)
    found = {"0": trainer.score()["score"]}
    for iteration in range(trainer.config.iterations):
        trainer.iterate()
        steps = (iteration + 1) * CONTROL["horizon"]
        if steps in SCORED_AFTER[task]:
            found[str(steps)] = trainer.score()["score"]
    close(trainer)
    return found


def polopt_speed(task: str) -> float:
    """Environment steps, each with an optimizer step, per CPU second of polopt's `sac`."""
    sizes = {"learning_starts": 0, "batch_size": SPEED["batch_size"]}
    control = {"hidden": [SPEED["width"]] * 2, "horizon": 50}
    trainer = build(
        RunConfig.create("", domain="control", method="sac", task=task, trainer=sizes, control=control)
    )
    for _ in range(SPEED["warm_up"] // 50):
        trainer.iterate()
    started = time.process_time()
    for _ in range(SPEED["steps"] // 50):
        trainer.iterate()
    found = SPEED["steps"] / (time.process_time() - started)
    close(trainer)
    return found


def stable_baselines3_speed(task: str) -> float:
    """The same of Stable-Baselines3, whose agent has a second pair of critics in place of the state value."""
    import gymnasium
    from stable_baselines3 import SAC

    widths = [SPEED["width"]] * 2
    model = SAC(
        "MlpPolicy", gymnasium.make(task), learning_starts=50, batch_size=SPEED["batch_size"], ent_coef=0.2,
        train_freq=50, gradient_steps=50, policy_kwargs={"net_arch": widths}, seed=0, device="cpu",
    )  # fmt: skip
    model.learn(SPEED["warm_up"])
    started = time.process_time()
    model.learn(SPEED["steps"], reset_num_timesteps=False)
    return SPEED["steps"] / (time.process_time() - started)


def speed(task: str, rounds: int) -> dict[str, Any]:
    """Both speeds, measured in turns, and their ratio."""
    pairs = [(polopt_speed(task), stable_baselines3_speed(task)) for _ in range(rounds)]
    ours, theirs = zip(*pairs, strict=True)
    return {
        "polopt": summary(list(ours)),
        "stable-baselines3": summary(list(theirs)),
        "ratio": summary([a / b for a, b in pairs]),
    }


def main() -> None:
    """Train every method and write what was found."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--task", choices=list(SCORED_AFTER), default="Pendulum-v1")
    arguments.add_argument("--seeds", type=int, default=5, help="runs of each method")
    arguments.add_argument("--rounds", type=int, default=3, help="measurements of the speed")
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("off_policy.json"))
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    started, task = time.process_time(), chosen.task
    found = {
        name: [learn(task, method, seed) for seed in range(chosen.seeds)] for name, method in METHODS.items()
    }
    report: dict[str, Any] = {
        "configuration": {
            "seeds": chosen.seeds, "task": task, "training": settings(task), "control": CONTROL, "methods": METHODS,
        }
    }  # fmt: skip
    for name, runs in found.items():
        report[name] = {key: summary([run[key] for run in runs]) for key in runs[0]}
    for key in map(str, SCORED_AFTER[task]):
        pairs = zip(found["mdpo-off"], found["sac"], strict=True)
        report[f"mdpo-off - sac, {key}"] = summary([a[key] - b[key] for a, b in pairs])
    report["kappa = lambda has the returns of sac, seed 0"] = learn(task, REDUCED, 0) == found["sac"][0]
    report["cpu_seconds"] = time.process_time() - started
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    report["speed"] = {"configuration": SPEED, "rounds": chosen.rounds, **speed(task, chosen.rounds)}
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
