"""What a selection saves: GRPO on a small language model, with and without it.

    python benchmarks/selection.py --out benchmarks/results/selection.json

A trajectory that a selection leaves out is not evaluated again: the update costs what is kept. The methods take turns in
one process, each with a model of its own from the same weights, on the same prompts; rewards are 0 and 1 by a coin.
`update` is the gradient passes and optimizer steps, `evaluation` what the selection wants evaluated of the behaviour
policy beforehand. CPU seconds, summed over threads; medians after warm-up.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import polopt
from polopt.batch import Batch
from polopt.language.actor import LanguageActor
from polopt.language.config import LanguageConfig
from polopt.language.examples import Example
from polopt.language.verifiers import Scores

METHODS = {"grpo": None, "d3s": "d3s", "pf_ppo": "pf_ppo", "capo": "capo"}
"""What fills the selection slot of GRPO; d3s is at the start of its schedule."""
WARM_UP = 1


class Coin:
    """Questions whose completions are worth 1 if they have an even number of characters: about half of them."""

    name, reward_names, heldout_size, train_size = "coin", ("even",), 0, 1000

    def train(self, prompt_id: int) -> Example:
        """One prompt."""
        return Example(prompt_id, f"Q: {prompt_id:04d}\nA:", "")

    heldout = train

    def score(self, completions: list[str], examples: list[Example]) -> Scores:
        """The rewards."""
        even = [float(sum(map(ord, completion)) % 2 == 0) for completion in completions]
        known = torch.ones(len(even), dtype=torch.bool)
        return Scores(
            torch.tensor(even, dtype=torch.float64)[:, None], self.reward_names, known, tuple(completions)
        )

    def close(self) -> None:
        """Nothing is held."""


class Timed(polopt.Trainer):
    """A trainer with clocks around its update and around what it evaluates beforehand."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seconds: dict[str, float] = {}
        self.rows = 0
        self.update: Any = self._clocked(self.update)
        self.actor.evaluate = self._counted(self.actor.evaluate)

    def step(self) -> dict[str, float]:
        """One iteration: its CPU seconds, and the rows that were evaluated with gradient."""
        self.seconds, self.rows = {"evaluation": 0.0}, 0
        started = time.process_time()
        metrics, _ = self.iterate()
        total = time.process_time() - started
        self.seconds["kept_tokens"] /= metrics["tokens"]
        return {"rows": self.rows, "iteration": total, **self.seconds}

    def _clocked(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def call(batch: Batch, *given: Any) -> Any:
            self.seconds["kept_tokens"] = float((batch.mask & (batch.weights > 0)).sum())
            started = time.process_time()
            result = update(batch, *given)
            self.seconds["update"] = time.process_time() - started
            return result

        return call

    def _counted(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """The rows of passes with gradient, the seconds of those without, all of which come before the update."""

        def call(batch: Batch, *given: Any, **options: Any) -> Any:
            started = time.process_time()
            result = evaluate(batch, *given, **options)
            if torch.is_grad_enabled():
                self.rows += len(batch)
            else:
                self.seconds["evaluation"] += time.process_time() - started
            return result

        return call


def trainer(selection: str | None, options: argparse.Namespace) -> Timed:
    """GRPO with a selection, on a model from scratch."""
    actor = LanguageActor.build(LanguageConfig(model=options.model, max_new_tokens=options.max_new_tokens))
    slots = {} if selection is None else {"selection": selection}
    settings = polopt.TrainerConfig(
        prompts=options.prompts, rollouts=options.rollouts, lr=1e-6, iterations=10_000, skip_silent=False
    )
    return Timed(actor, Coin(), polopt.recipe("grpo", None, **slots), settings)


def main() -> None:
    """Time the methods in turns and print what each update costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny:4x128")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the results go, JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainers = {name: trainer(selection, options) for name, selection in METHODS.items()}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for _ in range(options.repetitions + WARM_UP):
        for name, each in trainers.items():
            steps[name].append(each.step())
    medians = {
        name: {key: statistics.median(step.get(key, 0.0) for step in found[WARM_UP:]) for key in found[-1]}
        for name, found in steps.items()
    }
    for name, found in medians.items():
        found["update_relative_to_grpo"] = found["update"] / medians["grpo"]["update"]
        print(
            f"{name:7s} {found['rows']:5.0f} rows evaluated, {found['kept_tokens']:4.0%} of the tokens kept, update "
            f"{found['update']:6.2f} s ({found['update_relative_to_grpo']:.2f} of GRPO's), evaluation before it "
            f"{found['evaluation']:5.2f} s, iteration {found['iteration']:6.2f} s"
        )
    if options.out:
        given = {key: value for key, value in vars(options).items() if key != "out"}
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        results = {"machine": machine, **given, "medians": medians, "steps": steps}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
