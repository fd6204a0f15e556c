"""SubPO with a critic and generalised advantages against modular rewards, for a point mass that is to cover ground.

python reproductions/subpo/continuous.py --seeds 5 --out reproductions/subpo/continuous.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.report.statistics import bootstrap

TRAINING: dict[str, Any] = {
    "iterations": 60, "prompts": 15, "rollouts": 1, "lr": 1e-3, "max_grad_norm": 0.5, "score_prompts": 30,
}  # fmt: skip
CONTROL: dict[str, Any] = {
    "horizon": 101, "vectorization": "native", "restore": "reset", "hidden": [128, 128], "activation": "relu",
    "log_std": 0.1, "normalize_rewards": True, "report_info": ["gain"], "score_policy": "stochastic",
}  # fmt: skip
REWARDS = {"SubPO-GAE": "marginal", "ModPO-GAE": "modular", "cumulative coverage": "cumulative"}


def learn(reward: str, seed: int) -> dict[str, float]:
    """What 30 held-out episodes add to F(start), before and after, and how long they are."""
    settings = {"domain": "control", "task": "polopt/PointCoverage-v0", "method": "subpo-gae"}
    settings |= {"task_options": {"reward": reward}, "control": CONTROL, "trainer": TRAINING | {"seed": seed}}
    trainer = build(RunConfig.create("", **settings))
    before = trainer.score()
    for _ in range(trainer.config.iterations):
        trainer.iterate()
    after = trainer.score()
    close(trainer)
    return {"before": before["score/gain"], "after": after["score/gain"], "length": after["score/length"]}


def main() -> None:
    """Train with every reward and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs with each reward")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("continuous.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    report: dict[str, Any] = {"configuration": {"training": TRAINING, "control": CONTROL, "rewards": REWARDS}}
    for name, reward in REWARDS.items():
        runs = [learn(reward, seed) for seed in range(options.seeds)]
        report[name] = {
            key: {**vars(bootstrap([[run[key] for run in runs]])), "seeds": [run[key] for run in runs]}
            for key in runs[0]
        }
        report["cpu_seconds"] = round(time.process_time() - started)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
