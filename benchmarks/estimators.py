"""Advantages and losses of polopt beside those of verl and TRL, on the same tensors; every part of polopt timed.

    python benchmarks/estimators.py --verl-python .venv-oracle/bin/python --out benchmarks/results/estimators.json

[1024, 2048] float32, groups of 8. Each library runs in a process of its own with the same number of threads; they take
turns, so that whatever else the machine does meets all alike. Medians after warm-up. verl's advantages read the reward
from a tensor [N, T]; polopt's from [N, 1], and once more from [N, T].
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARM_UP = 3
COMPARED = [
    ("advantage, verl looped", ("verl", "advantage looped"), "advantage grpo"),
    ("advantage, verl vectorised", ("verl", "advantage vectorised"), "advantage grpo"),
    ("advantage, verl looped; both from [N, T]", ("verl", "advantage looped"), "advantage grpo of token rewards"),
    ("advantage, verl vectorised; both from [N, T]", ("verl", "advantage vectorised"), "advantage grpo of token rewards"),
    ("clipped loss and gradient, verl", ("verl", "loss"), "surrogate ppo"),
    ("clipped loss and gradient, TRL", ("trl", "loss"), "surrogate ppo"),
]  # fmt: skip


class Library:
    """A library in its own interpreter."""

    def __init__(self, name: str, python: str, sizes: list[int], threads: int) -> None:
        command = [python, str(HERE / "estimator_worker.py"), name, *map(str, sizes)]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "0",
            "HF_HUB_OFFLINE": "1",
        }
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.tasks: list[str] = self._read()
        self.times: dict[str, list[float]] = {task: [] for task in self.tasks}

    def run(self, task: str) -> None:
        """One repetition."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        self.times[task].append(self._read())

    def medians(self) -> dict[str, float]:
        """Milliseconds of each task after the warm-up."""
        return {task: statistics.median(found[WARM_UP:]) for task, found in self.times.items()}

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line[0] in "[0123456789":
                return json.loads(line)
        raise RuntimeError(f"{self.name}: ended with status {self.process.wait()}")


def measure(libraries: list[Library], repetitions: int) -> dict[str, dict[str, float]]:
    """Medians of all tasks of all libraries, in turns."""
    for _ in range(repetitions + WARM_UP):
        tasks = [(library, task) for library in libraries for task in library.tasks]
        for library, task in tasks:
            library.run(task)
    return {library.name: library.medians() for library in libraries}


def main() -> None:
    """Time everything, print the ratios and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verl-python", default=sys.executable, help="interpreter that has verl")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--sizes", type=int, nargs=3, default=[1024, 2048, 8], help="rows, decisions, group")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the results go, JSON")
    options = parser.parse_args()
    pythons = {"polopt": sys.executable, "verl": options.verl_python, "trl": options.trl_python}
    libraries = [Library(name, path, options.sizes, options.threads) for name, path in pythons.items()]
    medians = measure(libraries, options.repetitions)
    for library in libraries:
        library.close()
    ratios = {label: medians[name][task] / medians["polopt"][ours] for label, (name, task), ours in COMPARED}
    ours = medians["polopt"]
    base = {kind: ours[f"{kind} {name}"] for kind, name in (("advantage", "grpo"), ("surrogate", "ppo"))}
    relative = {task: value / base[task.partition(" ")[0]] for task, value in ours.items()}
    results = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "threads": options.threads,
        "rows": options.sizes[0], "decisions": options.sizes[1], "group": options.sizes[2],
        "repetitions": options.repetitions, "milliseconds": medians, "times_slower_than_polopt": ratios,
        "polopt_relative_to_grpo_and_ppo": relative,
    }  # fmt: skip
    for label, ratio in ratios.items():
        print(f"{label}: {ratio:.1f} times polopt's time")
    for task, value in sorted(ours.items()):
        print(f"{task:45s} {value:8.2f} ms {relative[task]:6.1f}x")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
