"""Bayesian policy gradient and actor-critic in miniature: errors of gradient estimates, and learning on the LQR.

python reproductions/bayesian-policy-gradient/run.py --seeds 400 --out reproductions/bayesian-policy-gradient/results.json
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from problems import BANDIT_FISHER, BANDIT_TRUTH, F64, LinearQuadratic, RandomWalk, bandit
from torch import Generator, Tensor

from polopt.functional.returns import rewards_to_go
from polopt.methods.gradient.bayesian_ac import decision_kernel, discounted_rows
from polopt.methods.gradient.bayesian_pg import Model, bayesian_quadrature
from polopt.methods.gradient.fisher import Fisher, FisherEstimator
from polopt.methods.gradient.gptd import gptd

BANDIT = {"noise": 1e-3, "samples": [10, 100]}
LQR = {"gain": -0.2, "spread": 1.0, "noise": 0.1, "fisher_trajectories": 400_000, "samples": [20, 100]}
WALK = {
    "noise": 1.0,
    "lengthscale": 3.0,
    "c_state": 100.0,
    "c_fisher": 1.0,
    "ridge": 1e-6,
    "samples": [10, 50],
}
LEARNING = {
    "episodes": 5, "updates": 60, "report": [10, 30, 60], "gain": -0.2, "spread": 0.5, "noise": 0.1, "memory": 0.9,
    "ridge": 1e-3, "rates": [0.1, 0.3, 1.0, 3.0, 10.0], "tuning_seeds": 8, "seeds": 40,
}  # fmt: skip


def generator(*key: int) -> Generator:
    """Random numbers of a place in the experiment."""
    number = 0
    for part in key:
        number = number * 100_003 + part
    return Generator().manual_seed(number)


def resampled(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """95 % interval of a statistic over the last dimension, by 2,000 bootstrap samples."""
    draws = torch.randint(values.shape[-1], (2000, values.shape[-1]), generator=generator(0))
    found = statistic(values[..., draws])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=F64)).tolist()
    return low, high


def errors(estimates: Tensor, truth: Tensor) -> dict[str, Any]:
    """Mean squared error and mean angle of estimates [seeds, n], with intervals."""
    squares = (estimates - truth).square().sum(-1)
    cosine = torch.nn.functional.cosine_similarity(estimates, truth[None], dim=-1)
    angles = cosine.clamp(-1, 1).acos().rad2deg()
    cut = len(squares) // 4
    low, high = resampled(squares, lambda x: x.mean(-1))
    angle_low, angle_high = resampled(angles, lambda x: x.mean(-1))
    return {
        "mse": float(squares.mean()), "low": low, "high": high,
        "iqm": float(squares.sort().values[cut : len(squares) - cut].mean()),
        "angle": float(angles.mean()), "angle_low": angle_low, "angle_high": angle_high,
        "squared_errors": [round(x, 6) for x in squares.tolist()],
    }  # fmt: skip


def against(found: dict[str, dict[str, Any]], name: str, baseline: str) -> dict[str, float]:
    """Ratio of two mean squared errors of the same samples, with its interval."""
    pair = torch.tensor([found[baseline]["squared_errors"], found[name]["squared_errors"]], dtype=F64)
    low, high = resampled(pair, lambda x: x[0].mean(-1) / x[1].mean(-1))
    return {"ratio": found[baseline]["mse"] / found[name]["mse"], "low": low, "high": high}


def run_bandit(seeds: int) -> dict[str, Any]:
    """Claim 1: mean and standard deviation of both components, by Monte Carlo and by model 1 with the exact Fisher."""
    fisher, found = Fisher.of(BANDIT_FISHER), {}
    for power in (1, 2):
        for samples in BANDIT["samples"]:
            estimates = torch.zeros(2, seeds, 2, dtype=F64)
            for seed in range(seeds):
                scores, rewards = bandit(samples, power, generator(1, power, samples, seed))
                estimates[0, seed] = rewards @ scores / samples
                estimates[1, seed] = bayesian_quadrature(scores, rewards, fisher, 1, BANDIT["noise"]).mean
            spread = estimates.std(1)
            ratios = []
            for component in range(2):
                pair = estimates[:, :, component]
                low, high = resampled(pair, lambda x: x[0].std(-1) / x[1].std(-1))
                ratio = float(spread[0, component] / spread[1, component])
                ratios.append({"ratio": ratio, "low": low, "high": high})
            found[f"r = a^{power}, {samples} samples"] = {
                "truth": BANDIT_TRUTH[power].tolist(),
                "monte_carlo": {"mean": estimates[0].mean(0).tolist(), "sd": spread[0].tolist()},
                "bayesian": {"mean": estimates[1].mean(0).tolist(), "sd": spread[1].tolist()},
                "sd_ratio": ratios,
            }
    return found


def run_lqr(seeds: int) -> dict[str, Any]:
    """Claim 2: gradient errors on the linear quadratic regulator."""
    problem, gain, spread = LinearQuadratic(), LQR["gain"], LQR["spread"]
    truth = problem.gradient(gain, spread)
    many = LQR["fisher_trajectories"]
    scores, _ = problem.sample(gain, spread, many, generator(2))
    known = Fisher.of(scores.T @ scores / many)
    cases: dict[str, tuple[Model, bool, bool]] = {
        "model 1": (1, False, False),
        "model 1, centred": (1, True, False),
        "model 2": (2, False, False),
        "model 2, centred": (2, True, False),
        "model 1, centred, Fisher of the same sample": (1, True, True),
        "model 2, centred, Fisher of the same sample": (2, True, True),
    }
    found: dict[str, Any] = {"truth": truth.tolist()}
    for samples in LQR["samples"]:
        estimates: dict[str, list[Tensor]] = {}
        for seed in range(seeds):
            scores, returns = problem.sample(gain, spread, samples, generator(3, samples, seed))
            centred = returns - returns.mean()
            estimates.setdefault("monte carlo", []).append(returns @ scores / samples)
            estimates.setdefault("monte carlo, centred", []).append(centred @ scores / samples)
            for name, (model, centre, same) in cases.items():
                fisher = Fisher.of_rows(scores / samples**0.5, 0.0) if same else known
                values = centred if centre else returns
                mean = bayesian_quadrature(scores, values, fisher, model, LQR["noise"]).mean
                estimates.setdefault(name, []).append(mean)
        here = {name: errors(torch.stack(rows), truth) for name, rows in estimates.items()}
        found[f"{samples} episodes"] = {
            "errors": here,
            "monte carlo / model 1": against(here, "model 1", "monte carlo"),
            "monte carlo / model 1, centred": against(here, "model 1, centred", "monte carlo"),
        }
    return found


def run_walk(seeds: int) -> dict[str, Any]:
    """Claim 3: gradient errors on the random walk."""
    problem = RandomWalk()
    truth = problem.gradient()
    found: dict[str, Any] = {"truth": truth.tolist()}
    for samples in WALK["samples"]:
        estimates: dict[str, list[Tensor]] = {}
        for seed in range(seeds):
            mask, states, scores, rewards = problem.sample(samples, generator(4, samples, seed))
            for name, mean in walk_estimates(problem, mask, states, scores, rewards).items():
                estimates.setdefault(name, []).append(mean)
        here = {name: errors(torch.stack(rows), truth) for name, rows in estimates.items()}
        found[f"{samples} episodes"] = {
            "errors": here,
            "reinforce / bac": against(here, "bac", "reinforce"),
            "actor-critic / bac": against(here, "bac", "actor-critic"),
        }
    return found


def walk_estimates(
    problem: RandomWalk, mask: Tensor, states: Tensor, scores: Tensor, rewards: Tensor
) -> dict[str, Tensor]:
    """Gradient estimates from the same walks."""
    gamma, count = problem.gamma, len(mask)
    returns = rewards_to_go(rewards, mask, gamma)
    discount = gamma ** torch.arange(mask.shape[1], dtype=F64)
    value = torch.zeros(problem.last, dtype=F64)
    visits = torch.bincount(states[mask], minlength=problem.last)
    value.index_add_(0, states[mask], returns[mask])
    value = value / visits.clamp(min=1)
    now = torch.where(mask, value[states], 0.0)
    following = torch.nn.functional.pad(now, (0, 1))[:, 1:]
    weights = {
        "reinforce": returns,
        "reinforce, value baseline": torch.where(mask, returns - now, 0.0),
        "actor-critic": torch.where(mask, rewards + gamma * following - now, 0.0),
    }
    found = {n: ((discount * w)[..., None] * scores).sum((0, 1)) / count for n, w in weights.items()}
    fisher = Fisher.of_rows(discounted_rows(scores, mask, gamma) / count**0.5, WALK["ridge"])
    places = states[mask].to(F64)[:, None]
    for name, c_state in (("bac", WALK["c_state"]), ("bac without state kernel", 0.0)):
        kernel = decision_kernel(scores[mask], places, fisher, c_state, WALK["c_fisher"], WALK["lengthscale"])
        values = gptd(rewards, mask, kernel, gamma, WALK["noise"])
        found[name] = values.gradient(scores[mask], fisher, WALK["c_fisher"]).mean
    return found


def policy_of(kappa: Tensor) -> tuple[float, float]:
    """Gain in (-1.999, -0.001) and spread in (0.001, 1.001) of unbounded parameters."""
    left = (-kappa).sigmoid().tolist()
    return -1.999 + 1.998 * left[0], 0.001 + left[1]


def learn(estimate: str, metric: str, rate: float, seed: int) -> list[float]:
    """Exact cost after each update.

    Args:
        estimate: "monte carlo" or "bayesian"; "returns as they are" does not subtract their mean, "exact Fisher" takes
            the matrix from the problem instead of a running estimate.
        metric: "plain" or "natural", the latter in the same Fisher matrix.
        rate: length of a step of norm 1; longer ones are cut to it.
        seed: of the episodes.
    """
    problem, draws, costs = LinearQuadratic(), generator(5, seed), []
    first = torch.tensor([(LEARNING["gain"] + 1.999) / 1.998, LEARNING["spread"] - 0.001], dtype=F64)
    kappa = -first.logit()
    running = FisherEstimator(LEARNING["ridge"], LEARNING["memory"], rank=2)
    for _ in range(LEARNING["updates"]):
        gain, spread = policy_of(kappa)
        slope = -(kappa.sigmoid() * (-kappa).sigmoid()) * torch.tensor([1.998, 1.0], dtype=F64)
        scores, returns = problem.sample(gain, spread, LEARNING["episodes"], draws)
        scores = scores * slope
        centred = returns if "as they are" in estimate else returns - returns.mean()
        if "exact" in estimate:
            fisher = Fisher.of(slope[:, None] * problem.fisher(gain, spread) * slope)
        else:
            fisher = running(scores, len(scores))
            running.observe(scores, len(scores))
        if estimate.startswith("monte carlo"):
            step = centred @ scores / len(scores)
        else:
            step = bayesian_quadrature(scores, centred, fisher, 1, LEARNING["noise"]).mean
        step = fisher.solve(step[None])[0] if metric == "natural" else step
        kappa = kappa + rate * step / step.norm().clamp(min=1.0)
        new_gain, new_spread = (torch.tensor(x, dtype=F64) for x in policy_of(kappa))
        costs.append(float(problem.cost(new_gain, new_spread)))
    return costs


def run_learning() -> dict[str, Any]:
    """Claim 4 on the regulator: cost along the updates, each method at the rate that is best on other seeds."""
    found: dict[str, Any] = {}
    estimates = (
        "monte carlo, returns as they are",
        "monte carlo",
        "bayesian, returns as they are",
        "bayesian",
        "bayesian, exact Fisher",
    )
    cases = itertools.product(estimates, ("plain", "natural"))
    for estimate, metric in cases:
        tuning = [10_000 + seed for seed in range(LEARNING["tuning_seeds"])]
        area = {
            rate: sum(sum(learn(estimate, metric, rate, seed)) for seed in tuning)
            for rate in LEARNING["rates"]
        }
        rate = min(area, key=lambda r: area[r])
        seeds = range(LEARNING["seeds"])
        costs = torch.tensor([learn(estimate, metric, rate, seed) for seed in seeds], dtype=F64)
        here: dict[str, Any] = {"rate": rate}
        for update in LEARNING["report"]:
            here[f"cost after {update} updates"] = mean_of(costs[:, update - 1])
        found[f"{estimate}, {metric}"] = here | {"average cost": mean_of(costs.mean(1))}
    return found


def mean_of(values: Tensor) -> dict[str, Any]:
    """Mean with its interval, interquartile mean and the numbers themselves."""
    cut = len(values) // 4
    low, high = resampled(values, lambda x: x.mean(-1))
    middle = float(values.sort().values[cut : len(values) - cut].mean())
    return {"mean": float(values.mean()), "low": low, "high": high, "iqm": middle, "seeds": values.tolist()}


def main() -> None:
    """Run the four experiments and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=400, help="repetitions of each estimate")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    settings = {"seeds": options.seeds, "bandit": BANDIT, "lqr": LQR, "walk": WALK, "learning": LEARNING}
    results = {
        "configuration": settings,
        "bandit": run_bandit(options.seeds),
        "lqr": run_lqr(options.seeds),
        "random walk": run_walk(options.seeds),
        "learning": run_learning(),
    }
    results["seconds"] = round(time.perf_counter() - started)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
