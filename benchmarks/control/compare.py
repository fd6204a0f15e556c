"""polopt's PPO beside Stable-Baselines3's and a plain loop's: same hyperparameters, environments, steps; speed and return.

    python benchmarks/control/compare.py --peers-python PYTHON --out benchmarks/results/control.json

With the Python of an environment that has them, Tianshou and rsl-rl run beside these. polopt runs twice, as it is and with
`trainer.compile`, and on the environment's own vectorised implementation where it has one; its first iteration, in which it
compiles, is not timed, and reported apart in CPU seconds with those of the C++ compiler.

All train the same seed at the same time, from when the last of them has compiled, one process and one thread each, so that
whatever else the machine does meets them alike. Speed is environment steps per CPU second of training; the bound is that of
polopt's environments stepped with random actions, if learning cost nothing. The return is that of 16 episodes by the policy's
mode after training; interquartile means over the seeds with 95 % bootstrap intervals.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from settings import PER_ITERATION, READY, SETTINGS, TASKS

from polopt.report.statistics import bootstrap

OWN = ("polopt", "polopt_compiled")
LIBRARIES = (*OWN, "stable_baselines3", "single_file")
TIMES = (
    "first_iteration_seconds", "later_iteration_seconds", "stepping_share", "acting_share", "update_share", "bound",
)  # fmt: skip
PEERS = ("tianshou", "rsl_rl")
Run = dict[str, dict[str, float]]


def side_by_side(interpreters: dict[str, str], env: str, seed: int, steps: int) -> Run:
    """All libraries at the same time, each with its Python."""
    with TemporaryDirectory() as cache:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCHINDUCTOR_CACHE_DIR": cache
        }  # fmt: skip
        return outputs(interpreters, [env, str(seed), str(steps)], environment)


def outputs(interpreters: dict[str, str], arguments: list[str], environment: dict[str, str]) -> Run:
    """What the workers print last."""
    here = Path(__file__).parent
    started: dict[str, Any] = {
        library: subprocess.Popen(
            [python, here / f"worker_{library}.py", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for library, python in interpreters.items()
    }
    for process in started.values():
        while (line := process.stdout.readline()) and line.strip() != READY:
            pass
    for process in started.values():
        if process.poll() is None:
            process.stdin.write("\n")
            process.stdin.flush()
    found = {}
    for library, process in started.items():
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{library} on {arguments[0]}: ended with status {process.returncode}")
        found[library] = json.loads(output.strip().splitlines()[-1])
    return found


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Medians of speeds, their ratios and shares, interquartile means of the returns."""
    summary: dict[str, Any] = {}
    for library in runs[0]:
        interval = bootstrap([np.array([run[library]["return"] for run in runs])])
        summary[library] = {
            "steps_per_second": median(runs, lambda run, own=library: run[own]["steps_per_second"]),
            "return": [interval.mean, interval.low, interval.high],
        }
    for own in OWN:
        for other in runs[0].keys() - set(OWN):
            ratios = [ratio(run, own, other) for run in runs]
            summary[f"{own} / {other}"] = float(np.median(ratios))
            summary[f"{own} / {other}, range"] = [min(ratios), max(ratios)]
        for name in TIMES:
            summary[own][name] = median(runs, lambda run, own=own, name=name: run[own][name])
    plain, compiled = (summary[own] for own in OWN)
    spent = compiled["first_iteration_seconds"] - plain["first_iteration_seconds"]
    gain = plain["later_iteration_seconds"] - compiled["later_iteration_seconds"]
    compiled["pays_after_steps"] = spent / gain * PER_ITERATION if gain > 0 else None
    return summary


def ratio(run: Run, own: str, other: str) -> float:
    """polopt's speed over another's."""
    return run[own]["steps_per_second"] / run[other]["steps_per_second"]


def median(runs: list[Run], number: Any) -> float:
    """Of a number of each run."""
    return float(np.median([number(run) for run in runs]))


def main() -> None:
    """Run them and print what they give."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40_960, help="environment steps of a run")
    parser.add_argument("--env", choices=list(TASKS), action="append")
    parser.add_argument(
        "--peers-python",
        help="Python of an environment that has tianshou and rsl-rl; without it they are left out",
    )
    parser.add_argument("--out", type=Path, help="where the results go, JSON")
    options = parser.parse_args()
    interpreters: dict[str, str] = dict.fromkeys(LIBRARIES, sys.executable)
    if options.peers_python:
        interpreters |= dict.fromkeys(PEERS, options.peers_python)
    else:
        print(f"Without --peers-python: {' and '.join(PEERS)} were left out.", flush=True)
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", **SETTINGS}
    results |= {"steps": options.steps, "seeds": options.seeds}
    for env in options.env or TASKS:
        runs = [side_by_side(interpreters, env, seed, options.steps) for seed in range(options.seeds)]
        results[env] = summarize(runs) | {"runs": runs}
        print(env, json.dumps({k: v for k, v in results[env].items() if k != "runs"}), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
