"""TRL's side: one line of JSON for each optimizer step, taken when a line arrives on standard input."""

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from prompts import PROMPTS, ROLLOUTS, SCENARIOS, last_number_is, prompt, questions
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Timed(GRPOTrainer):
    """GRPOTrainer with a clock around generation."""

    generation = 0.0
    tokens = 0

    def _generate(self, prompts: list) -> Any:
        started = time.perf_counter(), time.process_time()
        result = super()._generate(prompts)
        self.generation += time.process_time() - started[1]
        self.tokens += sum(len(ids) for ids in result[1])
        return result


class Gate(TrainerCallback):
    """Waits for a line before each step and reports what the step cost."""

    trainer: Timed

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        sys.stdin.readline()
        self.trainer.generation, self.trainer.tokens = 0.0, 0
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        record = {
            "wall": wall, "cpu": cpu, "generate": self.trainer.generation, "train": cpu - self.trainer.generation,
            "tokens": self.trainer.tokens, "peak": peak,
        }  # fmt: skip
        print(json.dumps(record), flush=True)


def main(scenario: str, model_path: str, steps: int) -> None:
    """Train for `steps` steps."""
    sizes = SCENARIOS[scenario]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if sizes["newline_stops"]:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer("\n")["input_ids"][0]]
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    rows = [{"prompt": prompt(scenario, q), "answer": a} for q, a in questions(PROMPTS * (steps + 2))]

    def reward(completions: list, answer: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [last_number_is(text, right) for text, right in zip(texts, answer, strict=True)]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS * ROLLOUTS // 16, num_generations=ROLLOUTS,
        max_completion_length=sizes["max_new_tokens"], learning_rate=1e-5, lr_scheduler_type="constant", beta=0.0,
        loss_type="dapo", temperature=1.0, bf16=True, use_cpu=True, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", shuffle_dataset=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    gate = Gate()
    trainer = Timed(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[gate],
    )  # fmt: skip
    gate.trainer = trainer
    print(
        json.dumps({"loaded": loaded, "parameters": sum(p.numel() for p in model.parameters())}), flush=True
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
