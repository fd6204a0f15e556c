"""BPO against PPO on CartPole-v1 with equal budget, in miniature: return, and how far ratios go.

python reproductions/brrl/cartpole.py --seeds 4 --out reproductions/brrl/cartpole.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from run import summary

import polopt
from polopt.batch import Batch
from polopt.control.actor import ControlActor
from polopt.control.config import ControlConfig
from polopt.control.task import ControlTask

WIDTH = 0.2
TRAINING: dict[str, Any] = {
    "iterations": 24,
    "prompts": 8,
    "rollouts": 1,
    "epochs": 10,
    "minibatches": 8,
    "score_prompts": 20,
}
CONTROL: dict[str, Any] = {"horizon": 128, "hidden": [64, 64]}
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {
        "name": "ppo", "advantage": "gae:gamma=0.99", "surrogate": f"ppo:clip_low={WIDTH},clip_high={WIDTH}",
        "regularizers": ["value:coef=1"],
    },
    "bpo": {"name": "bpo", "surrogate": f"bpo:width_low={WIDTH},width_high={WIDTH}"},
    "bpo, mean": {
        "name": "bpo", "surrogate": f"bpo:width_low={WIDTH},width_high={WIDTH},use_median=false",
        "regularizers": ["value:coef=1"],
    },
}  # fmt: skip


class Watched(ControlActor):
    """Reports how far the ratios of an iteration's data are from 1 after its updates."""

    @torch.no_grad()
    def observe(self, batch: Batch) -> dict[str, float]:
        """Ratios of the policy now to the one that made the data."""
        logp = self.evaluate(batch, frozenset({"logp"})).logp
        distance = ((logp - batch.old_logp).exp() - 1).abs()[batch.mask]
        share = float((distance > 1.02 * WIDTH).double().mean())
        return super().observe(batch) | {"share_outside": share, "largest_ratio": 1 + float(distance.max())}


def learn(name: str, seed: int, lr: float) -> dict[str, float]:
    """Return of twenty held-out episodes of the policy as it acts, and the mean share of ratios beyond the width."""
    slots = dict(METHODS[name])
    method = polopt.recipe(slots.pop("name"), **slots)
    settings = ControlConfig(**CONTROL, score_policy="stochastic")
    task = ControlTask("CartPole-v1", settings)
    config = polopt.TrainerConfig(seed=seed, lr=lr, **TRAINING)
    trainer = polopt.Trainer(Watched(task, settings, method.requires, seed), task, method, config)
    metrics = [trainer.iterate()[0] for _ in range(config.iterations)]
    score = float(trainer.score()["score"])
    task.close()
    return {
        "return": score,
        "share_outside": sum(m["share_outside"] for m in metrics) / len(metrics),
        "largest_ratio": max(m["largest_ratio"] for m in metrics),
    }


def main() -> None:
    """Train every method with both learning rates and write what was found."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=4, help="runs of each configuration")
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("cartpole.json"))
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "configuration": {
            "seeds": chosen.seeds, "width": WIDTH, "training": TRAINING, "control": CONTROL, "methods": METHODS,
        }
    }  # fmt: skip
    for lr in (1e-3, 3e-3):
        found = {name: [learn(name, seed, lr) for seed in range(chosen.seeds)] for name in METHODS}
        for name, runs in found.items():
            report[f"{name}, lr {lr}"] = {key: summary([run[key] for run in runs]) for key in runs[0]}
        for name in ("bpo", "bpo, mean"):
            for key in ("return", "share_outside"):
                pairs = zip(found[name], found["ppo"], strict=True)
                report[f"{name} - ppo, lr {lr}: {key}"] = summary([a[key] - b[key] for a, b in pairs])
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
