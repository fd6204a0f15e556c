"""BRRL (arXiv 2604.18578) in miniature: the closed form in finite processes, and GBPO on a token task.

python reproductions/brrl/run.py --seeds 8 --out reproductions/brrl/results.json
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polopt
from polopt.engine.ranks import Ranks
from polopt.methods.trust_region.bpo import bounded_ratio_optimum
from polopt.miniature import SumModActor, SumModTask
from polopt.testing.tabular import TabularMDP

TABULAR: dict[str, Any] = {"states": 20, "actions": 4, "gamma": 0.9}
LAMBDAS = [1e-6, 1e-3, 0.1, 1.0, 10.0]
WIDTH, STEPS, RIVALS = 0.3, 100, 5
TRAINING: dict[str, Any] = {
    "iterations": 60,
    "prompts": 24,
    "rollouts": 8,
    "epochs": 8,
    "minibatches": 1,
    "lr": 0.01,
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


def worst(errors: dict[str, float], **found: Tensor) -> None:
    """Keep the largest violation of each law."""
    for name, violation in found.items():
        errors[name] = max(errors.get(name, 0.0), float(violation.max()))


def check(
    mdp: TabularMDP, policy: Tensor, lam: float, draws: torch.Generator, errors: dict[str, float]
) -> Tensor:
    """One step of (B2) in all states, with how far it is from the card's identities 1 to 3; the new policy."""
    before = mdp.evaluate(policy)
    found = bounded_ratio_optimum(policy, before.q, lam, 1 - WIDTH, 1 + WIDTH)
    centred = before.q - found.mu[:, None]
    gain = WIDTH * (policy * centred * torch.tanh(centred / (2 * lam))).sum(-1)
    new = found.policy / found.policy.sum(-1, keepdim=True)
    after = mdp.evaluate(new)
    predicted = mdp.visits(new) @ found.gain / (1 - mdp.gamma)
    worst(
        errors,
        mean_ratio_is_one=(found.policy.sum(-1) - 1).abs(),
        ratio_within_bounds=(found.ratio - 1).abs() - WIDTH,
        gain_is_closed_form=(found.gain - gain).abs(),
        gain_is_not_negative=-found.gain,
        improvement_is_visited_gain=(after.value - before.value - predicted).abs(),
        values_never_fall=before.value - after.value,
    )
    for _ in range(RIVALS):
        logits = torch.randn(policy.shape, generator=draws, dtype=torch.float64)
        ratio = (policy.clamp(min=1e-300).log() + logits).softmax(-1) / policy.clamp(min=1e-300)
        rival = (policy * (ratio - 1) * before.advantage).sum(-1)
        distance = (policy * (ratio - found.ratio).abs() * before.advantage.abs()).sum(-1)
        worst(errors, no_rival_beats_bound=found.gain - distance - rival)
    return new


def tabular(seeds: int) -> dict[str, Any]:
    """Miniature A: identities 1 to 3 and 7, and whether values rise to the optimum."""
    report: dict[str, Any] = {}
    for lam in LAMBDAS:
        errors: dict[str, float] = {}
        left: list[float] = []
        for seed in range(seeds):
            mdp, draws = TabularMDP.random(seed, **TABULAR), torch.Generator().manual_seed(seed)
            policy = torch.full_like(mdp.reward, 1 / mdp.reward.shape[1])
            for _ in range(STEPS):
                policy = check(mdp, policy, lam, draws, errors)
            left.append(float((mdp.evaluate(mdp.optimal()).value - mdp.evaluate(policy).value).max()))
        report[f"lambda={lam:g}"] = {"largest_violation": errors, f"gap_after_{STEPS}": summary(left)}
    errors = {}
    for seed in range(seeds):
        q = torch.randn(50, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for elite in (1, 2, 5):
            found = bounded_ratio_optimum(torch.full_like(q, 0.1), q, 1e-12, 0.0, 10 / elite)
            expected = torch.where(q >= q.topk(elite).values.amin(-1, keepdim=True), 10 / elite, 0.0)
            worst(errors, ratio_is_the_cross_entropy_methods=(found.ratio - expected).abs())
    report["lambda to 0, no floor"] = {"largest_violation": errors}
    return report


class GradientNorms(Ranks):
    """One process that remembers the gradient norm of each update."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip as usual, and remember."""
        norm = super().clip_gradients(parameters, max_norm)
        self.norms.append(float(norm))
        return norm


def learn(recipe: str, surrogate: str, seed: int) -> dict[str, float]:
    """How the success rate of the rollouts rises, and how steady gradients and ratios are."""
    task, ranks = SumModTask(), GradientNorms()
    config = polopt.TrainerConfig(seed=seed, **TRAINING)
    method = polopt.recipe(recipe, surrogate=surrogate)
    trainer = polopt.Trainer(SumModActor(task, seed=seed), task, method, config, ranks=ranks)
    metrics = [trainer.iterate()[0] for _ in range(config.iterations)]
    curve = [m["reward"] for m in metrics]
    norms = torch.tensor(ranks.norms, dtype=torch.float64)
    norms = norms[norms > 0]
    reached = next((k for k, success in enumerate(curve) if success >= SOLVED), config.iterations)
    return {
        "final": sum(curve[-5:]) / 5,
        "area": sum(curve) / len(curve),
        "iterations_to_0.8": float(reached),
        "grad_norm_p99_over_median": float(norms.quantile(0.99) / norms.median()),
        "grad_norm_max_over_median": float(norms.max() / norms.median()),
        "largest_ratio": max(m.get("ratio/max", 1.0) for m in metrics),
    }


def tokens(seeds: int) -> dict[str, Any]:
    """Miniature C: GBPO with hard targets against GRPO of the same width."""
    report: dict[str, Any] = {}
    for width in (0.2, 0.5):
        bounded = f"width_low={width},width_high={width}"
        clipped = f"ppo:clip_low={width},clip_high={width},aggregation=token_mean"
        runs = {
            "gbpo": ("gbpo", f"bounded_ratio:{bounded}"),
            "gbpo tau=1": ("gbpo", f"bounded_ratio:{bounded},tau=1"),
            "grpo": ("grpo", clipped),
        }
        for name, (recipe, surrogate) in runs.items():
            found = [learn(recipe, surrogate, seed) for seed in range(seeds)]
            report[f"{name}, width {width}"] = {key: summary([run[key] for run in found]) for key in found[0]}
    return report


def main() -> None:
    """Run both miniatures and write what they found."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=8, help="runs of each configuration")
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    configuration = {
        "seeds": chosen.seeds,
        "tabular": TABULAR | {"lambdas": LAMBDAS, "width": WIDTH, "steps": STEPS, "rivals_per_step": RIVALS},
        "tokens": TRAINING | {"modulus": 6, "length": 4, "width": 48, "solved": SOLVED},
    }
    report = {
        "configuration": configuration,
        "tabular": tabular(chosen.seeds),
        "tokens": tokens(chosen.seeds),
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
