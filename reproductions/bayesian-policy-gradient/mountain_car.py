"""Bayesian actor-critic against Monte Carlo and actor-critic gradients on mountain car, by episodes per update.

python reproductions/bayesian-policy-gradient/mountain_car.py --seeds 10 --out reproductions/bayesian-policy-gradient/mountain_car.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polopt.control.environments.mountain_car import WIDTH, MountainCar, gaussian_features
from polopt.functional.returns import rewards_to_go
from polopt.methods.gradient.bayesian_ac import decision_kernel, discounted_rows, gaussian_kernel
from polopt.methods.gradient.fisher import Fisher
from polopt.methods.gradient.gptd import gptd
from polopt.report.statistics import bootstrap

GAMMA, UPDATES, EVERY, TEST_EPISODES = 0.99, 60, 10, 100
EPISODES = [5, 10, 20]
"""Per update."""
RATES = [0.03, 0.1, 0.3, 1.0, 3.0]
TUNING_SEEDS = 3
NOISE, C_STATE, C_FISHER, RIDGE = 9.0, 1.0, 1.0, 1e-6
REACHED = [80.0, 60.0]
"""Mean steps to the goal whose first crossing is reported."""
TOLERANCE = 1e-8
"""Largest variance, in units of the kernel, that its factor leaves of a decision."""
F64 = torch.float64
PROBLEM = MountainCar()


class Episodes:
    """M episodes of each of R policies [R, 32], softmax over the features with 16 parameters for each action."""

    def __init__(self, theta: np.ndarray, count: int, draws: list[np.random.Generator]) -> None:
        noise = np.concatenate([d.random((count, PROBLEM.horizon + 2)) for d in draws])
        weights = (theta[:, 16:] - theta[:, :16]).repeat(count, 0)
        state, alive = PROBLEM.start(noise[:, :2]), np.ones(len(noise), dtype=bool)
        columns: list[tuple[np.ndarray, ...]] = []
        for step in range(PROBLEM.horizon):
            seen = PROBLEM.observe(state).astype(np.float64)
            features = gaussian_features(seen)
            forward = 1 / (1 + np.exp(-(features * weights).sum(-1)))
            action = (noise[:, step + 2] < forward).astype(np.int64)
            columns.append((alive, seen, features, forward, action))
            alive = alive & ~PROBLEM.move(state, action, noise[:, :0]).terminated
            if not alive.any():
                break
        shape = (len(theta), count, len(columns))
        stacked = [np.stack(column, 1) for column in zip(*columns, strict=True)]
        found = [torch.from_numpy(c).reshape(*shape, *c.shape[2:]) for c in stacked]
        self.mask, self.seen, self.features, self.forward, self.action = found

    def steps(self) -> np.ndarray:
        """Mean length of the episodes of each policy, [R]."""
        return self.mask.double().sum(-1).mean(-1).numpy()


def gradient(estimate: str, made: Episodes, row: int) -> Tensor:
    """An estimate [32] of the gradient of the expected discounted return from the episodes of one policy."""
    mask, features, count = made.mask[row], made.features[row], len(made.mask[row])
    push = made.action[row] - made.forward[row]
    scores = torch.cat([-push[..., None] * features, push[..., None] * features], -1) * mask[..., None]
    rewards = -mask.double()
    returns = rewards_to_go(rewards, mask, GAMMA)
    if estimate == "bayesian":
        weights = torch.zeros(mask.shape, dtype=F64)
        weights[mask] = C_FISHER * posterior_weights(scores, made.seen[row], mask, returns[mask])
        return (weights[..., None] * scores).sum((0, 1))
    values = fitted_values(features, mask, returns)
    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    advantages = {
        "monte carlo": returns,
        "monte carlo, value baseline": returns - values,
        "actor-critic": rewards + GAMMA * following - values,
    }[estimate]
    discount = GAMMA ** torch.arange(mask.shape[1], dtype=F64)
    return ((discount * advantages * mask)[..., None] * scores).sum((0, 1)) / count


def fitted_values(features: Tensor, mask: Tensor, returns: Tensor) -> Tensor:
    """Values of the states, 0 outside the mask: least squares of the returns on the features and a constant."""
    inputs = torch.cat([features, torch.ones(*mask.shape, 1, dtype=F64)], -1)
    rows = inputs[mask]
    gram = rows.T @ rows + 1e-3 * torch.eye(rows.shape[1], dtype=F64)
    return (inputs @ torch.linalg.solve(gram, rows.T @ returns[mask])) * mask


def posterior_weights(scores: Tensor, seen: Tensor, mask: Tensor, returns: Tensor) -> Tensor:
    """alpha = (K + noise I)^-1 returns over all decisions: what `gptd` solves, by a factor L of K = L L^T of low rank."""
    fisher = fisher_of(scores, mask)
    rows, places = scores[mask], seen[mask]
    solved = fisher.solve(rows)
    left = C_FISHER * (rows * solved).sum(-1) + C_STATE
    factor = torch.zeros(len(rows), 0, dtype=F64)
    while float(left.max()) > TOLERANCE and factor.shape[1] < len(rows):
        pivot = int(left.argmax())
        column = C_STATE * gaussian_kernel(places, places[pivot : pivot + 1], WIDTH)[:, 0]
        column = column + C_FISHER * (rows @ solved[pivot]) - factor @ factor[pivot]
        column = column / left[pivot].sqrt()
        factor, left = torch.cat([factor, column[:, None]], 1), left - column.square()
    inner = factor.T @ factor + NOISE * torch.eye(factor.shape[1], dtype=F64)
    return (returns - factor @ torch.linalg.solve(inner, factor.T @ returns)) / NOISE


def fisher_of(scores: Tensor, mask: Tensor) -> Fisher:
    """The Fisher matrix of the same episodes."""
    return Fisher.of_rows(discounted_rows(scores, mask, GAMMA) / len(mask) ** 0.5, RIDGE)


def factor_error() -> float:
    """Largest difference of the weights to the library's closed form, relative to the largest weight."""
    made = Episodes(np.zeros((1, 32)), 5, [np.random.default_rng(0)])
    mask, push = made.mask[0], made.action[0] - made.forward[0]
    scores = torch.cat([-push[..., None] * made.features[0], push[..., None] * made.features[0]], -1)
    scores = scores * mask[..., None]
    returns = rewards_to_go(-mask.double(), mask, GAMMA)[mask]
    found = posterior_weights(scores, made.seen[0], mask, returns)
    kernel = decision_kernel(
        scores[mask], made.seen[0][mask], fisher_of(scores, mask), C_STATE, C_FISHER, WIDTH
    )
    exact = gptd(-mask.double(), mask, kernel, GAMMA, NOISE).alpha
    return float((found - exact).abs().max() / exact.abs().max())


def learn(estimate: str, episodes: int, runs: list[tuple[float, int]]) -> np.ndarray:
    """Mean steps to the goal of runs (rate, seed) before, after every ten updates, [R, 7]; all with the same code."""
    theta = np.zeros((len(runs), 32))
    curves = []
    for update in range(UPDATES + 1):
        if update % EVERY == 0:
            draws = [np.random.default_rng([1, seed, update]) for _, seed in runs]
            curves.append(Episodes(theta, TEST_EPISODES, draws).steps())
        if update == UPDATES:
            break
        made = Episodes(theta, episodes, [np.random.default_rng([0, seed, update]) for _, seed in runs])
        for row, (rate, _) in enumerate(runs):
            step = gradient(estimate, made, row)
            theta[row] += (rate * step / step.norm().clamp(min=1.0)).numpy()
    return np.stack(curves, 1)


def episodes_to(curve: np.ndarray, steps: float, per_update: int) -> float:
    """Training episodes until the goal takes at most so many steps on average; all of them if it never does."""
    below = np.flatnonzero(curve <= steps)
    return float((below[0] * EVERY if len(below) else UPDATES) * per_update)


def report(estimate: str, episodes: int, seeds: int) -> dict[str, Any]:
    """Curves of the seeds at the rate that is best on others."""
    tuning = [(rate, 10_000 + seed) for rate in RATES for seed in range(TUNING_SEEDS)]
    areas = learn(estimate, episodes, tuning).mean(1).reshape(len(RATES), TUNING_SEEDS).mean(1)
    rate = RATES[int(areas.argmin())]
    curves = learn(estimate, episodes, [(rate, seed) for seed in range(seeds)])
    summary: Callable[[np.ndarray], dict[str, float]] = lambda values: vars(bootstrap([values]))  # noqa: E731
    found: dict[str, Any] = {"rate": rate, "area by rate": dict(zip(RATES, areas.tolist(), strict=True))}
    found |= {f"steps after {at * EVERY} updates": summary(curves[:, at]) for at in (1, 3, 6)}
    for steps in REACHED:
        crossings = np.array([episodes_to(curve, steps, episodes) for curve in curves])
        found[f"episodes to {steps:g} steps"] = summary(crossings)
        found[f"runs that reach {steps:g} steps"] = int((curves.min(1) <= steps).sum())
    return found | {"curves": curves.round(2).tolist()}


def main() -> None:
    """Train by every estimate and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="runs of each configuration")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mountain_car.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    names = (
        "GAMMA",
        "UPDATES",
        "TEST_EPISODES",
        "RATES",
        "TUNING_SEEDS",
        "NOISE",
        "C_STATE",
        "C_FISHER",
        "RIDGE",
    )
    results: dict[str, Any] = {"configuration": {name.lower(): globals()[name] for name in names}}
    results["configuration"] |= {"seeds": options.seeds, "factor error": factor_error()}
    for episodes in EPISODES:
        for estimate in ("monte carlo", "monte carlo, value baseline", "actor-critic", "bayesian"):
            results[f"{estimate}, {episodes} episodes"] = report(estimate, episodes, options.seeds)
            results["cpu_seconds"] = round(time.process_time() - started)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
