"""MDPO (arXiv 2005.09814) in miniature: exact mirror steps in finite processes, and inner steps on a token task.

python reproductions/mdpo/run.py --seeds 10 --out reproductions/mdpo/results.json
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polopt
from polopt.methods.trust_region.mdpo import mirror_step
from polopt.miniature import SumModActor, SumModTask
from polopt.testing.tabular import TabularMDP

TABULAR: dict[str, Any] = {"states": 20, "actions": 4, "gamma": 0.9}
STEPS = 100
TRUST_REGION = 0.01
TRAINING: dict[str, Any] = {
    "iterations": 60,
    "prompts": 24,
    "rollouts": 8,
    "minibatches": 1,
    "lr": 0.01,
    "max_grad_norm": 1.0,
}
SOLVED = 0.8


def summary(values: list[float]) -> dict[str, Any]:
    """Mean with the 95 % interval of 10,000 bootstrap samples, interquartile mean and the numbers themselves."""
    x = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(x), (10_000, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[draws].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    cut = len(x) // 4
    middle = float(x.sort().values[cut : len(x) - cut].mean())
    return {"mean": float(x.mean()), "low": low, "high": high, "iqm": middle, "seeds": values}


def constant(mdp: TabularMDP, policy: Tensor, k: int) -> Tensor:
    """(D2) with t = 1."""
    return mirror_step(policy, mdp.evaluate(policy).advantage, 1.0).policy


def geometric(mdp: TabularMDP, policy: Tensor, k: int) -> Tensor:
    """(D2) with t_k = gamma^-k."""
    return mirror_step(policy, mdp.evaluate(policy).advantage, mdp.gamma**-k).policy


def natural_gradient(mdp: TabularMDP, policy: Tensor, k: int) -> Tensor:
    """Natural policy gradient with line search: largest step within the trust region, halved until values improve.

    Its direction for a softmax policy is the advantage, so each candidate is a mirror step.
    """
    found, visits = mdp.evaluate(policy), mdp.visits(policy).mean(0)
    variance = (visits[:, None] * policy * found.advantage.square()).sum()
    size = math.sqrt(2 * TRUST_REGION / float(variance.clamp(min=1e-300)))
    for _ in range(30):
        step = mirror_step(policy, found.advantage, size)
        better = mdp.evaluate(step.policy).value.mean() > found.value.mean()
        if better and (visits * step.kl).sum() <= TRUST_REGION:
            return step.policy
        size /= 2
    return policy


def gaps(mdp: TabularMDP, advance: Callable[[TabularMDP, Tensor, int], Tensor]) -> tuple[list[float], float]:
    """Largest V* - V_k over the states after each step, and the largest fall of any state's value in one step."""
    best = mdp.evaluate(mdp.optimal()).value
    policy = torch.full_like(mdp.reward, 1 / mdp.reward.shape[1])
    value, fall = mdp.evaluate(policy).value, 0.0
    found = [float((best - value).max())]
    for k in range(STEPS):
        policy = advance(mdp, policy, k)
        new = mdp.evaluate(policy).value
        fall, value = max(fall, float((value - new).max())), new
        found.append(float((best - value).max()))
    return found, fall


def half_rates(found: list[float]) -> list[float]:
    """Factor by which the gap shrinks per step in the first and in the second half of the way down to 1e-9."""
    end = next((k for k, gap in enumerate(found) if gap < 1e-9), len(found) - 1)
    ends = [0, end // 2, end]
    spans = zip(ends, ends[1:], strict=False)
    return [(found[b] / found[a]) ** (1 / (b - a)) if found[b] > 0 else 0.0 for a, b in spans]


def tabular(seeds: int) -> dict[str, Any]:
    """Miniature A: are steps monotone, and is the convergence linear?"""
    report: dict[str, Any] = {}
    for name, advance in (
        ("t=1", constant),
        ("t=gamma^-k", geometric),
        ("natural gradient", natural_gradient),
    ):
        curves = [gaps(TabularMDP.random(seed, **TABULAR), advance) for seed in range(seeds)]
        first, second = zip(*(half_rates(found) for found, _ in curves), strict=True)
        report[name] = {
            "largest_fall_of_a_value": max(fall for _, fall in curves),
            "gap_after_20": summary([found[20] for found, _ in curves]),
            "gap_after_100": summary([found[100] for found, _ in curves]),
            "factor_per_step_first_half": summary(list(first)),
            "factor_per_step_second_half": summary(list(second)),
        }
    return report


def learn(recipe: str, seed: int, epochs: int, **slots: str) -> dict[str, Any]:
    """How the success rate of the rollouts rises, and the mean gradient norm of the first and last iterations."""
    task = SumModTask()
    config = polopt.TrainerConfig(seed=seed, epochs=epochs, **TRAINING)
    trainer = polopt.Trainer(SumModActor(task, seed=seed), task, polopt.recipe(recipe, **slots), config)
    metrics = [trainer.iterate()[0] for _ in range(config.iterations)]
    curve = [m["reward"] for m in metrics]
    reached = next((k for k, success in enumerate(curve) if success >= SOLVED), config.iterations)
    return {
        "final": sum(curve[-5:]) / 5,
        "area": sum(curve) / len(curve),
        "iterations_to_0.8": float(reached),
        "grad_norm_first": metrics[0].get("grad_norm", 0.0),
        "grad_norm_last": metrics[-1].get("grad_norm", 0.0),
    }


def tokens(seeds: int) -> dict[str, Any]:
    """Miniature B: do inner steps help, and is a clip needed?"""
    runs: dict[str, tuple[str, int, dict[str, str]]] = {
        "grpo m=1": ("grpo", 1, {}),
        "mdpo m=1": ("mdpo", 1, {}),
        "mdpo m=5": ("mdpo", 5, {}),
        "mdpo m=10": ("mdpo", 10, {}),
        "mdpo m=10, constant t": ("mdpo", 10, {"surrogate": "mdpo:schedule=constant"}),
        "grpo m=10": ("grpo", 10, {}),
        "grpo m=10, no clip": ("grpo", 10, {"surrogate": "ppo:clip_low=0.999,clip_high=1e6"}),
    }
    found = {
        name: [learn(recipe, seed, epochs, **slots) for seed in range(seeds)]
        for name, (recipe, epochs, slots) in runs.items()
    }
    report: dict[str, Any] = {
        name: {key: summary([run[key] for run in of_seed]) for key in of_seed[0]}
        for name, of_seed in found.items()
    }
    for key in ("final", "area", "iterations_to_0.8"):
        pairs = zip(found["mdpo m=10"], found["grpo m=10"], strict=True)
        report[f"mdpo - grpo at m=10: {key}"] = summary([a[key] - b[key] for a, b in pairs])
    return report


def main() -> None:
    """Run both miniatures and write what they found."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=10, help="runs of each configuration")
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    configuration = {
        "seeds": chosen.seeds, "tabular": TABULAR | {"steps": STEPS, "trust_region": TRUST_REGION},
        "tokens": TRAINING | {"modulus": 6, "length": 4, "width": 48, "solved": SOLVED},
    }  # fmt: skip
    report = {
        "configuration": configuration,
        "tabular": tabular(chosen.seeds),
        "tokens": tokens(chosen.seeds),
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
