"""SubPO against modular rewards on coverage, experiment design and item collection.

    python reproductions/subpo/run.py --seeds 5 --out reproductions/subpo/results.json

Each problem is one of polopt's environments, batched natively; the policy is a table of logits for each time and cell, or
a tanh network over (cell, time) or over the cells visited so far. The method is the recipe `subpo` with the options named
below. A result is the mean F of 1000 episodes of the final policy.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import polopt
import polopt.control.environments  # registers polopt/...
from polopt.batch import Batch, Evaluation
from polopt.control.environments.submodular_grid import greedy_walk
from polopt.functional.submodular import grid_points


def two_hills() -> np.ndarray:
    """Weights of the 8 x 8 grid: a high hill far from the start, and a lower one."""
    points = grid_points(8, 8).numpy()

    def hill(x: float, y: float) -> np.ndarray:
        return np.exp(-((points - [x, y]) ** 2).sum(-1) / 0.05)

    return hill(0.9, 0.9) + 0.5 * hill(0.1, 0.6) + 0.05


PROBLEMS: dict[str, dict[str, Any]] = {
    "coverage": {"height": 8, "width": 8, "start": 0, "horizon": 15, "weights": two_hills()},
    "information": {"horizon": 39},
    "items": {"horizon": 39},
    "two_rooms": {"horizon": 39},
}
NAMES = {
    "coverage": "polopt/CoverageGrid-v0",
    "information": "polopt/ExperimentDesign-v0",
    "items": "polopt/ItemCollection-v0",
    "two_rooms": "polopt/TwoRooms-v0",
}
SUBPO, GREEDY = "subpo", "subpo:discount=0"
PREFIX = "subpo:credit=prefix_value,baseline=none,start_value={start}"
VARIANTS: dict[str, dict[str, Any]] = {
    "SubPO": {"advantage": SUBPO},
    "SubPO, greedy (kappa 0)": {"advantage": GREEDY},
    "prefix values, no baseline": {"advantage": PREFIX},
    "ModPO": {"advantage": SUBPO, "reward": "modular"},
    "SubPO, network, Markov": {"advantage": SUBPO, "policy": "markov", "lr": 0.01},
    "SubPO, network, history": {"advantage": SUBPO, "policy": "history", "lr": 0.01},
    "ModPO, network, Markov": {"advantage": SUBPO, "reward": "modular", "policy": "markov", "lr": 0.01},
}
RUNS = [("coverage", variant) for variant in VARIANTS]
RUNS += [("information", name) for name in ("SubPO", "ModPO")]
RUNS += [("items", name) for name in ("SubPO", "ModPO")]
RUNS += [("two_rooms", name) for name in ("SubPO", "SubPO, greedy (kappa 0)", "ModPO")]
EPOCHS = {"coverage": 200, "information": 300, "items": 200, "two_rooms": 200}
EPISODES, LR = 200, 0.2


class Table(nn.Module):
    """A logit for each action, cell and time."""

    def __init__(self, cells: int, times: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(cells, times, 5))

    def forward(self, observations: Tensor) -> Tensor:
        """Logits of observations (cell, time)."""
        cell, step = observations.long().unbind(-1)
        return self.logits[cell, step]


def make_policy(kind: str, env: Any) -> nn.Module:
    """The policy of a vector environment: "index" a table, "markov" and "history" networks of 64 and 32 tanh units."""
    if kind == "index":
        return Table(*env.single_observation_space.nvec.tolist())
    inputs = env.single_observation_space.shape[0]
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5)]
    return nn.Sequential(*layers)


def roll_out(env: Any, policy: nn.Module, scale: float, draw: torch.Generator) -> tuple[Batch, Tensor]:
    """One episode in each row of `env`, and F of each."""
    seen, _ = env.reset()
    observations, actions, rewards, info = [], [], [], {}
    for _ in range(env.problem.horizon):
        observations.append(torch.from_numpy(np.asarray(seen, dtype=np.float32)) / scale)
        with torch.no_grad():
            chosen = torch.multinomial(policy(observations[-1]).softmax(-1), 1, generator=draw)[:, 0]
        seen, reward, _, _, info = env.step(chosen.numpy())
        actions.append(chosen)
        rewards.append(torch.from_numpy(reward))
    count, shape = env.num_envs, (env.num_envs, env.problem.horizon)
    payload = {"observations": torch.stack(observations, 1), "actions": torch.stack(actions, 1)}
    batch = Batch(
        mask=torch.ones(shape, dtype=torch.bool),
        old_logp=torch.zeros(shape),
        rewards=torch.zeros(count, 1),
        group=torch.zeros(count, dtype=torch.int64),
        prompt_id=torch.zeros(count, dtype=torch.int64),
        step_rewards=torch.stack(rewards, 1),
        payload=TensorDict(payload, batch_size=[count]),
        batch_size=[count],
    )
    return batch, torch.from_numpy(info["objective"])


def train(problem: str, variant: str, seed: int) -> float:
    """Mean F of the final policy."""
    options = VARIANTS[variant]
    kind = options.get("policy", "index")
    settings = PROBLEMS[problem] | {"reward": options.get("reward", "marginal"), "observation": kind}
    env: Any = gymnasium.make_vec(NAMES[problem], num_envs=EPISODES, **settings)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    policy = make_policy(kind, env)
    scale = float(len(env.problem.modular)) if kind == "history" else 1.0
    env.reset(seed=seed)
    start = float(env.problem.modular[env.problem.first])
    method = polopt.recipe("subpo", advantage=options["advantage"].format(start=start))
    optimizer = method.optimizer.build(policy.parameters(), options.get("lr", LR))
    for _ in range(EPOCHS[problem]):
        batch, _ = roll_out(env, policy, scale, draw)
        batch = method.prepare(batch, lambda name: draw)
        batch.loss_weight = method.surrogate.loss_weights(batch)
        logits = policy(batch.payload["observations"]).log_softmax(-1)
        logp = logits.gather(-1, batch.payload["actions"][..., None])[..., 0]
        optimizer.zero_grad()
        method.objective(Evaluation(logp), batch).backward()
        optimizer.step()
    return float(torch.cat([roll_out(env, policy, scale, draw)[1] for _ in range(1000 // EPISODES)]).mean())


def interval(values: list[float]) -> dict[str, float]:
    """Mean, interquartile mean and a 95 % interval of the mean (Student)."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    spread = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    width = STUDENT[min(len(values) - 1, 20)] * spread
    middle = ordered[cut : len(ordered) - cut]
    return {
        "mean": mean(values),
        "iqm": mean(middle),
        "low": mean(values) - width,
        "high": mean(values) + width,
    }


STUDENT = dict(
    enumerate(
        [math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
         2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
    )
)  # fmt: skip
"""97.5 % quantiles by degrees of freedom; the last for more."""


def references() -> dict[str, float]:
    """F of the walk that always takes the largest gain."""
    found = {}
    for problem, settings in PROBLEMS.items():
        env: Any = gymnasium.make(NAMES[problem], **settings).unwrapped
        grid = env.problem
        found[problem] = greedy_walk(grid.function, grid.moves, grid.first, grid.horizon)[1]
    return found


def main(report: Callable[[str], None] = print) -> None:
    """Run all and write the results."""
    parser = argparse.ArgumentParser(description="SubPO against modular rewards.")
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of seeds, from 0 on; at most 3 beyond coverage"
    )
    parser.add_argument("--out", type=Path, default=Path("reproductions/subpo/results.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configuration = {
        "seeds": arguments.seeds, "episodes": EPISODES, "lr": LR, "epochs": EPOCHS, "environments": NAMES,
        "polopt": polopt.__version__, "torch": torch.__version__,
    }  # fmt: skip
    runs: list[dict[str, Any]] = []
    content = {"configuration": configuration, "greedy_walk": references(), "runs": runs}
    for problem, variant in RUNS:
        seeds = arguments.seeds if problem == "coverage" else min(arguments.seeds, 3)
        start = time.process_time()
        values = [train(problem, variant, seed) for seed in range(seeds)]
        seconds = (time.process_time() - start) / seeds
        found = interval(values)
        runs.append(
            {"problem": problem, "variant": variant, "options": VARIANTS[variant], "cpu_seconds": seconds}
            | {"F": values, **found}
        )
        report(f"{problem:12} {variant:28} {found['mean']:7.3f} [{found['low']:.3f}, {found['high']:.3f}]")
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
