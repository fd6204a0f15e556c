"""On-policy MDPO with the exact Gaussian KL against PPO on Pendulum-v1 with equal budget, in miniature.

python reproductions/mdpo/control.py --seeds 4 --out reproductions/mdpo/control.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from run import summary

import polopt
from polopt.control.actor import ControlActor
from polopt.control.config import ControlConfig
from polopt.control.task import ControlTask

TRAINING: dict[str, Any] = {
    "iterations": 60, "prompts": 8, "rollouts": 1, "epochs": 10, "minibatches": 4, "lr": 1e-3,
    "lr_schedule": "linear", "max_grad_norm": 0.5, "score_prompts": 30,
}  # fmt: skip
CONTROL: dict[str, Any] = {
    "horizon": 256, "hidden": [64, 64], "normalize_observations": True, "normalize_rewards": True,
    "score_policy": "stochastic",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"name": "ppo", "advantage": "gae:gamma=0.99"},
    "mdpo": {"name": "mdpo", "domain": "control"},
    "mdpo, constant t": {"name": "mdpo", "domain": "control", "surrogate": "mdpo:kl=exact,schedule=constant"},
}


def learn(name: str, seed: int) -> dict[str, float]:
    """Mean return of thirty held-out episodes, of the policy as it acts."""
    slots = dict(METHODS[name])
    method = polopt.recipe(slots.pop("name"), **slots)
    settings = ControlConfig(**CONTROL)
    task = ControlTask("Pendulum-v1", settings)
    config = polopt.TrainerConfig(seed=seed, **TRAINING)
    trainer = polopt.Trainer(ControlActor(task, settings, method.requires, seed), task, method, config)
    before = float(trainer.score()["score"])
    for _ in range(config.iterations):
        trainer.iterate()
    after = float(trainer.score()["score"])
    task.close()
    return {"before": before, "after": after}


def main() -> None:
    """Train every method and write what was found."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=4, help="runs of each method")
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("control.json"))
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    found = {name: [learn(name, seed) for seed in range(chosen.seeds)] for name in METHODS}
    report: dict[str, Any] = {
        "configuration": {
            "seeds": chosen.seeds, "training": TRAINING, "control": CONTROL, "methods": METHODS,
        }
    }  # fmt: skip
    for name, runs in found.items():
        report[name] = {key: summary([run[key] for run in runs]) for key in runs[0]}
    for name in ("mdpo", "mdpo, constant t"):
        pairs = zip(found[name], found["ppo"], strict=True)
        report[f"{name} - ppo"] = summary([a["after"] - b["after"] for a, b in pairs])
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
