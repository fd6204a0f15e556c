"""polopt's side: one line of JSON for each iteration, taken when a line arrives on standard input."""

import json
import resource
import sys
import time
from typing import Any

import torch
from prompts import PROMPTS, ROLLOUTS, SCENARIOS, last_number_is, prompt, questions

import polopt
from polopt.language.actor import LanguageActor
from polopt.language.config import LanguageConfig
from polopt.language.tasks import Example
from polopt.language.verifiers import Scores


class Sums:
    """The benchmark's prompts as a task."""

    name, reward_names, heldout_size = "sums", ("right",), 0

    def __init__(self, scenario: str, count: int) -> None:
        self.examples = [Example(i, prompt(scenario, q), a, {}) for i, (q, a) in enumerate(questions(count))]
        self.train_size = count

    def train(self, prompt_id: int) -> Example:
        """One prompt."""
        return self.examples[prompt_id]

    heldout = train

    def score(self, completions: list[str], examples: list[Example]) -> Scores:
        """1 for the right number."""
        right = [last_number_is(c, e.answer) for c, e in zip(completions, examples, strict=True)]
        rewards = torch.tensor(right, dtype=torch.float64)[:, None]
        found = torch.ones(len(right), dtype=torch.bool)
        return Scores(rewards, self.reward_names, found, tuple(completions))

    def close(self) -> None:
        """Nothing is held."""


def main(scenario: str, model_path: str, steps: int) -> None:
    """Train for `steps` iterations; no trajectory is skipped, entropies are computed."""
    sizes = SCENARIOS[scenario]
    language = LanguageConfig(model=model_path, max_new_tokens=sizes["max_new_tokens"])
    actor = LanguageActor.build(language, stop=("\n",) if sizes["newline_stops"] else ())
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        json.dumps({"loaded": loaded, "parameters": sum(p.numel() for p in actor.model.parameters())}),
        flush=True,
    )
    config = polopt.TrainerConfig(prompts=PROMPTS, rollouts=ROLLOUTS, lr=1e-5, skip_silent=False)
    method = polopt.recipe("grpo", surrogate="ppo:aggregation=token_mean")
    trainer = polopt.Trainer(actor, Sums(scenario, PROMPTS * (steps + 2)), method, config)
    for _ in range(steps):
        sys.stdin.readline()
        started: tuple[float, float] = time.perf_counter(), time.process_time()
        metrics, _ = trainer.iterate()
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        generate = metrics["time/generate"] * cpu / wall
        record: dict[str, Any] = {
            "wall": wall, "cpu": cpu, "generate": generate, "train": cpu - generate, "tokens": metrics["tokens"],
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "entropy": metrics["entropy"],
            "mismatch": metrics.get("mismatch/mean"),
        }  # fmt: skip
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
