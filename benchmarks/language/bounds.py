"""Where an iteration's time goes, and how far it is from what the machine can do.

    python benchmarks/language/bounds.py --out benchmarks/results/language_bounds.json

Measured in the same minute: the rate of bfloat16 matrix products of the model's shapes (the bound of reading prompts and
of the update), the bandwidth of reading memory (a decode step reads all weights once), and three iterations of the
benchmark's scenarios. Operations: 2 per parameter and token forward, 4 more backward, 2 more for the head, whose logits
are computed again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from prompts import PROMPTS, ROLLOUTS, SCENARIOS
from worker_polopt import Sums

import polopt
from polopt.language.actor import LanguageActor
from polopt.language.config import LanguageConfig


def product_rate(rows: int = 1024, inner: int = 576, outer: int = 1536) -> float:
    """Operations per second of bfloat16 products of a hidden state with a layer's weight, both threads."""
    x, w = torch.randn(rows, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
    best = float("inf")
    for _ in range(50):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * outer / best


def read_rate(megabytes: int = 512) -> float:
    """Bytes per second of reading memory."""
    data = torch.ones(megabytes * 2**18)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return data.numel() * 4 / best


def measure(scenario: str, model: str, iterations: int = 3) -> dict[str, Any]:
    """Seconds of generation and update per iteration, and the share of the bounds they reach."""
    sizes = SCENARIOS[scenario]
    actor = LanguageActor.build(
        LanguageConfig(model=model, max_new_tokens=sizes["max_new_tokens"]),
        stop=("\n",) if sizes["newline_stops"] else (),
    )
    config = polopt.TrainerConfig(prompts=PROMPTS, rollouts=ROLLOUTS, skip_silent=False)
    task = Sums(scenario, PROMPTS * (iterations + 2))
    trainer = polopt.Trainer(actor, task, polopt.recipe("grpo"), config)
    steps = [trainer.iterate()[0] for _ in range(iterations + 1)][1:]
    seconds = {k: statistics.median(s[f"time/{k}"] for s in steps) for k in ("generate", "update")}
    tokens = statistics.median(s["tokens"] for s in steps)
    longest = max(s["length/max"] for s in steps)
    prompt_tokens = sum(len(actor.tokenizer(str(task.train(i).prompt))["input_ids"]) for i in range(PROMPTS))
    parameters = sum(p.numel() for p in actor.model.parameters())
    head = actor.model.get_output_embeddings().weight.numel()
    body = parameters - head
    reading = 2 * (parameters * tokens + body * prompt_tokens)
    updating = 6 * body * (tokens + prompt_tokens) + 8 * head * tokens
    rate, bandwidth = product_rate(), read_rate()
    return {
        "seconds": seconds, "tokens": tokens, "prompt_tokens": prompt_tokens, "products_per_second": rate,
        "bytes_per_second": bandwidth,
        "generate_share_of_product_bound": reading / rate / seconds["generate"],
        "generate_share_of_streaming_bound": longest * 2 * parameters / bandwidth / seconds["generate"],
        "update_share_of_product_bound": updating / rate / seconds["update"],
    }  # fmt: skip


def main() -> None:
    """Measure both scenarios."""
    parser = argparse.ArgumentParser(description="time against bounds")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {scenario: measure(scenario, options.model) for scenario in SCENARIOS}
    print(json.dumps(results, indent=1))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
