"""N-PG-IGT on the point task and (N)-HARPG on the chain, against vanilla and momentum policy gradients.

    python reproductions/n-pg-igt-harpg/run.py --seeds 32 --out reproductions/n-pg-igt-harpg/results.json

The recursions are those of `polopt.methods.gradient` on vectors of parameters, all seeds at once, each with draws and
parameters of its own; gradients and Hessian-vector products come from the same trajectories and functions that the
trainer uses.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from domains import GAMMA, Chain, Point
from torch import Tensor

from polopt.batch import Evaluation
from polopt.engine.hessian import evaluation_product
from polopt.methods.gradient.gradient_average import (
    averaged,
    averaging_weight,
    decayed,
    extrapolated,
    transport_share,
)
from polopt.methods.gradient.harpg import corrected
from polopt.methods.gradient.n_pg_igt import score_objective, step_weights


@dataclass(frozen=True)
class Algorithm:
    """What distinguishes the algorithms of the paper."""

    eta_power: float
    step_power: float
    normalized: bool
    look_ahead: bool = False
    hessian: bool = False


ALGORITHMS = {
    "vanilla-pg": Algorithm(0.0, 2 / 3, False),
    "nsgdm": Algorithm(2 / 3, 1.0, True),
    "n-pg-igt": Algorithm(4 / 5, 1.0, True, look_ahead=True),
    "harpg": Algorithm(1.0, 1 / 2, False, hessian=True),
    "n-harpg": Algorithm(1.0, 1.0, True, hessian=True),
}
POINT = [("vanilla-pg", 0.03), ("nsgdm", 0.6), ("n-pg-igt", 0.6), ("nsgdm", 0.3), ("n-pg-igt", 0.3)]
CHAIN = [("vanilla-pg", 0.3), ("vanilla-pg", 0.1), ("harpg", 0.3), ("harpg", 0.1), ("n-harpg", 1.0)]


def gradient(task: Point | Chain, theta: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """g at theta, the mean over `count` trajectories of each run."""
    theta = theta.detach().requires_grad_()
    with torch.no_grad():
        decisions, rewards = task.rollout(theta, count, draws)
    mask = torch.ones_like(rewards, dtype=torch.bool).flatten(0, 1)
    weights = step_weights(rewards.flatten(0, 1), mask, GAMMA)
    phi = score_objective(task.logp(theta, decisions).flatten(0, 1), weights, mask)
    return torch.autograd.grad(phi.sum() / count, theta)[0]


def hessian_product(
    task: Point | Chain, theta: Tensor, direction: Tensor, count: int, draws: torch.Generator
) -> Tensor:
    """B v at theta, the mean over `count` trajectories of each run; the runs share no parameters."""
    theta = theta.detach().requires_grad_()
    with torch.no_grad():
        decisions, rewards = task.rollout(theta, count, draws)
    mask = torch.ones_like(rewards, dtype=torch.bool).flatten(0, 1)
    weights = step_weights(rewards.flatten(0, 1), mask, GAMMA) / count
    evaluation = Evaluation(task.logp(theta, decisions).flatten(0, 1))
    return evaluation_product(evaluation, {"logp": weights}, mask, [theta], [direction])[0]


def train(
    task: Point | Chain, name: str, first_step: float, trajectories: int, count: int, seeds: int
) -> dict[str, Tensor]:
    """Final J, and the error of the direction over the last tenth of the iterations: one number per seed."""
    algorithm, draws = ALGORITHMS[name], torch.Generator().manual_seed(seeds)
    iterations = trajectories // (count * (2 if algorithm.hessian else 1))
    theta = previous = torch.zeros(seeds, *task.shape, dtype=torch.float64)
    average: Tensor | None = None
    squared, relative = [], []
    for t in range(iterations):
        eta = averaging_weight(1.0, algorithm.eta_power, t)
        there = extrapolated(theta, previous, transport_share(eta)) if algorithm.look_ahead else theta
        g = gradient(task, there, count, draws)
        if algorithm.hessian and t:
            q = torch.rand(seeds, 1, 1, generator=draws, dtype=torch.float64)
            between = q * theta + (1 - q) * previous
            g = corrected(g, hessian_product(task, between, theta - previous, count, draws), eta)
        average = averaged(g, average, eta)
        if t >= 0.9 * iterations and t % max(1, iterations // 100) == 0:
            exact = task.value(theta)[1].flatten(1)
            squared.append((average.flatten(1) - exact).square().sum(-1))
            relative.append(squared[-1].sqrt() / exact.norm(dim=-1))
        norm = average.flatten(1).norm(dim=-1)[:, None, None] if algorithm.normalized else torch.ones(())
        step = decayed(first_step, algorithm.step_power, t)
        previous, theta = theta, theta + step * average / norm.clamp(min=1e-300)
    return {
        "J": task.value(theta)[0],
        "squared_error": torch.stack(squared).median(0).values,
        "relative_error": torch.stack(relative).median(0).values,
    }


def describe(values: Tensor) -> dict[str, Any]:
    """Mean, median and interquartile mean over the seeds, each with a bootstrap 95 % interval, and every value."""
    draws = torch.Generator().manual_seed(0)
    again = values[torch.randint(len(values), (10000, len(values)), generator=draws)].sort(-1).values
    quarter, ends = len(values) // 4, torch.tensor([0.025, 0.975], dtype=torch.float64)
    found: dict[str, Any] = {}
    for name, trim in (("mean", 0), ("iqm", quarter), ("median", (len(values) - 1) // 2)):
        inside = slice(trim, len(values) - trim)
        low, high = torch.quantile(again[:, inside].mean(-1), ends).tolist()
        found[name] = [float(values.sort().values[inside].mean()), low, high]
    return found | {"per_seed": [round(value, 6) for value in values.tolist()]}


def main() -> None:
    """Run both tasks and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=32, help="runs of each point setting; the chain has 8 times as many"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    tasks = {
        "point": (Point(), POINT, {"trajectories": 2000, "count": 5, "seeds": options.seeds}),
        "chain": (Chain(), CHAIN, {"trajectories": 3000, "count": 1, "seeds": 8 * options.seeds}),
    }
    results: dict[str, Any] = {"gamma": GAMMA}
    for task_name, (task, settings, sizes) in tasks.items():
        start = torch.zeros(1, *task.shape, dtype=torch.float64)
        results[task_name] = {"sizes": sizes, "J at the start": float(task.value(start)[0])}
        for name, first_step in settings:
            found = train(task, name, first_step, **sizes)
            results[task_name][f"{name} {first_step}"] = {
                key: describe(values) for key, values in found.items()
            }
    results["seconds"] = round(time.perf_counter() - started)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
