"""polopt and TRL's GRPOTrainer side by side: same model, prompts, sizes, stop rules and update.

    python benchmarks/language/compare_trl.py --model DIR --out benchmarks/results/language_trl.json

Each library runs in a process of its own; steps alternate, so that whatever else the machine does meets both alike. The
first steps of each are warm-up and left out. TRL runs in its best configuration here: bfloat16 autocast, no gradient
checkpointing. polopt samples in bfloat16, trains float32 weights under bfloat16 autocast and corrects for the sampler by
truncated importance weights. CPU seconds are summed over threads.
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
WARM_UP = 2
QUANTITIES = ("wall", "cpu", "generate", "train")


class Worker:
    """A library in its own process."""

    def __init__(self, library: str, scenario: str, model: str, steps: int) -> None:
        command = [sys.executable, str(HERE / f"worker_{library}.py"), scenario, model, str(steps)]
        environment = os.environ | {  # as polopt's command line sets it, for both
            "PYTHONWARNINGS": "ignore",
            "GOMP_SPINCOUNT": "10000",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
            "THP_MEM_ALLOC_ENABLE": "1",
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE,
        )
        self.library = library
        self.start = self._read()
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        """One iteration."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._read())

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and line.rstrip().endswith("}") and '"' in line:
                return json.loads(line)
        raise RuntimeError(f"{self.library}: ended with status {self.process.wait()}")

    def medians(self) -> dict[str, float]:
        """Median of each quantity after the warm-up, and the peak memory beyond the weights."""
        kept = self.steps[WARM_UP:]
        found = {q: statistics.median(s[q] for s in kept) for q in (*QUANTITIES, "tokens")}
        weights = self.start["parameters"] * 4 / 1e6
        return found | {"memory_beyond_weights_mb": kept[-1]["peak"] - weights, "peak_mb": kept[-1]["peak"]}


def compare(scenario: str, model: str, steps: int) -> dict[str, Any]:
    """Medians of both libraries and the ratios TRL / polopt."""
    workers = {library: Worker(library, scenario, model, steps + WARM_UP) for library in ("trl", "polopt")}
    for number in range(steps + WARM_UP):
        for library, worker in workers.items():
            worker.step()
            print(f"{scenario} step {number} {library}: {worker.steps[-1]}", file=sys.stderr)
    medians = {library: worker.medians() for library, worker in workers.items()}
    names = (*QUANTITIES, "memory_beyond_weights_mb", "tokens")
    ratios = {name: medians["trl"][name] / medians["polopt"][name] for name in names}
    return {"medians": medians, "ratios": ratios, "steps": {name: w.steps for name, w in workers.items()}}


def main() -> None:
    """Run the scenarios and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model both load")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each library")
    parser.add_argument("--scenario", choices=["chat", "few_shot"], action="append")
    parser.add_argument("--out", type=Path, help="where the results go, JSON")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "steps": options.steps,
    }
    for scenario in options.scenario or ["chat", "few_shot"]:
        results[scenario] = compare(scenario, options.model, options.steps)
        ratios = results[scenario]["ratios"]
        print(f"{scenario}: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
