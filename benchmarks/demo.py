"""The demo over several seeds: held-out score before and after, and how long an iteration took.

    python benchmarks/demo.py --seeds 0 1 2 --out benchmarks/results/demo.json

A run folder `runs/demo-SEED` that holds a finished run is read, not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SCORES = ("score", "score/low", "score/high", "score/format")


def result(seed: int, folder: Path) -> dict[str, Any]:
    """The finished run of a seed."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "polopt", "train", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "before": {name: summary["before"][name] for name in SCORES},
        "after": {name: summary["after"][name] for name in SCORES},
        "sampled_reward": [round(line["reward"], 4) for line in metrics],
        "seconds_per_iteration": statistics.median(line["time/iteration"] for line in metrics),
    }


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description="the demo over several seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = [result(seed, Path("runs") / f"demo-{seed}") for seed in options.seeds]
    for found in results:
        before, after = (
            "{score:.3f} [{score/low:.3f}, {score/high:.3f}]".format(**found[k]) for k in ("before", "after")
        )
        print(
            f"seed {found['seed']}: {before} -> {after}, {found['seconds_per_iteration']:.1f} s per iteration"
        )
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
