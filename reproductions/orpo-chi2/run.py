"""Occupancy against action regularisation under a hacked proxy: python reproductions/orpo-chi2/run.py

Exact optimisation of the ring, of a tomato grid and of random tables, then PPO on sampled episodes of the ring. Writes
every problem's and seed's true return, and means with 95 % intervals.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import exact
import sampled
import torch

RUNS = {
    "none": [0.0],
    "occupancy_sqrt_chi2": [0.1, 0.3, 1.0, 3.0],
    "occupancy_kl": [0.3, 1.0, 3.0, 10.0],
    "action_sqrt_chi2": [0.1, 0.3, 1.0, 3.0],
    "action_kl": [1.0, 3.0, 10.0, 30.0],
}
"""Coefficients of the sampled runs."""
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
"""Student's t for 1 to 9 degrees of freedom; 1.96 beyond."""


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval of Student's t."""
    data = torch.tensor(values, dtype=torch.float64)
    mean, count = float(data.mean()), len(values)
    if count == 1:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    factor = T_975[count - 2] if count - 2 < len(T_975) else 1.96
    half = factor * float(data.std()) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def best_of_sweep(found: dict[str, Any]) -> dict[str, Any]:
    """Gain over the reference with each problem's best coefficient, and what the others lack of sqrt-chi2 occupancy."""
    gain = {
        kind: [max(row) - reference for row, reference in zip(found[kind], found["reference"], strict=True)]
        for kind in exact.KINDS
    }
    first = gain[exact.KINDS[0]]
    lead = {
        kind: interval([a - b for a, b in zip(first, gain[kind], strict=True)]) for kind in exact.KINDS[1:]
    }
    free = [a - b for a, b in zip(found["unregularised"], found["reference"], strict=True)]
    return {
        "gain": {kind: interval(values) for kind, values in gain.items()} | {"unregularised": interval(free)},
        "lead_of_occupancy_sqrt_chi2": lead,
    }


def sample(seeds: int) -> dict[str, Any]:
    """Final true returns of the sampled runs."""
    return {
        kind: {
            str(coef): {"true_return": values, **interval(values)}
            for coef in coefs
            if (values := [sampled.train(kind, coef, seed) for seed in range(seeds)])
        }
        for kind, coefs in RUNS.items()
    }


def main() -> None:
    """Run everything and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the sampled runs")
    parser.add_argument("--tables", type=int, default=60, help="random tables that are optimised exactly")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ring, tomatoes, tables = exact.ring(), exact.tomatoes(), exact.random_tables(options.tables)
    on_tables = exact.sweep(tables)
    results = {
        "configuration": {
            "seeds": options.seeds,
            "tables": options.tables,
            "gamma": exact.GAMMA,
            "steps": exact.STEPS,
            "lr": exact.LR,
            "correlation_of_tables": exact.CORRELATION,
            "episodes": sampled.EPISODES,
            "horizon": sampled.HORIZON,
            "iterations": sampled.ITERATIONS,
            "averaged_iterations": sampled.LAST,
        },
        "ring_exact": {"correlation": exact.correlations(ring)[0], **exact.sweep(ring)},
        "tomatoes_exact": {"correlation": exact.correlations(tomatoes)[0], **exact.sweep(tomatoes)},
        "random_tables_exact": {**best_of_sweep(on_tables), **on_tables},
        "ring_sampled": sample(options.seeds),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
