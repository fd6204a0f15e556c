"""A causal language model as the policy: decisions are the tokens of its completions."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Int
from tensordict import TensorDict
from torch import Tensor, nn

from polopt.batch import EVALUATED, OFF_POLICY, Batch, Evaluation
from polopt.domain import Plan, Rollout
from polopt.engine.gradient import evaluate_rows
from polopt.engine.memory import return_free_memory
from polopt.engine.ranks import Ranks
from polopt.language.completions import Completions, SamplingConfig
from polopt.language.config import LanguageConfig
from polopt.language.evaluation import evaluate_completions, micro_batches
from polopt.language.model import LanguageModel, Lora, load_language_model
from polopt.language.prompts import encode_prompt
from polopt.language.sampler import CompletionSampler
from polopt.language.scoring import score_statistics
from polopt.language.stored import stored_completions, stored_scores
from polopt.language.task_mixture import Mixture
from polopt.language.tasks import LanguageTask

LARGE_MODEL = 10_000_000
"""Parameters from which "auto" precision is bfloat16."""
SAMPLES = 3


class ValueHead(nn.Module):
    """A linear critic on the model's last hidden state, 0 at the start."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Value in reward units of each hidden state [..., H] -> [...]."""
        return self.linear(hidden).squeeze(-1)


class LanguageActor:
    """Samples completions and evaluates them.

    The policy is softmax(logits / temperature) over the whole vocabulary; all log-probabilities are its own. With top-p
    or top-k the sampler draws from a truncation of it, whose log-probabilities go into `sampler_logp`.

    Args:
        model: the model and its tokenizer.
        config: sampling, precision and memory.
        stop: strings that end a completion.
        critic: add a value head.
    """

    domain = "language"
    independent_decisions = False

    def __init__(
        self,
        model: LanguageModel,
        config: LanguageConfig,
        *,
        stop: tuple[str, ...] = (),
        critic: bool = False,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model.model, model.tokenizer
        self.language_model = model
        self.module = nn.ModuleDict({"policy": self.model})
        weights = getattr(torch, config.dtype)
        if critic:
            self.module["critic"] = ValueHead(self.model.config.get_text_config().hidden_size, weights)
        large = sum(p.numel() for p in self.model.parameters()) > LARGE_MODEL and weights == torch.float32
        compute = {"auto": torch.bfloat16 if large else weights, "same": weights, "bfloat16": torch.bfloat16}
        self.compute_dtype, sampler_dtype = compute[config.compute_dtype], compute[config.sampler_dtype]
        self.own_rollouts = not config.stored
        self.exact_sampler = sampler_dtype == weights and self.compute_dtype == weights
        self.sampler = CompletionSampler(
            self.model,
            self.tokenizer,
            None if sampler_dtype == weights else sampler_dtype,
            config.sampler_rows,
        )
        self.sampling = SamplingConfig(
            config.max_new_tokens, config.temperature, config.top_p, config.top_k, stop
        )
        self.scoring = SamplingConfig(config.max_new_tokens, config.score_temperature, stop=stop)
        lacks = {"kl", "median"} | (set() if critic else {"value"})
        self.provides = EVALUATED - OFF_POLICY - lacks
        self.provides |= {"old_entropy", "terminated", "truncated", "answer", "task"}

    @classmethod
    def build(
        cls, config: LanguageConfig, *, stop: tuple[str, ...] = (), critic: bool = False, seed: int = 0
    ) -> Self:
        """Load the model that the configuration names.

        Raises:
            ConfigError: there is no such model.
        """
        lora = Lora(rank=config.lora_rank, alpha=config.lora_alpha) if config.lora_rank else None
        model = load_language_model(config.model, dtype=getattr(torch, config.dtype), lora=lora, seed=seed)
        return cls(model, config, stop=stop, critic=critic)

    def rollout(self, task: LanguageTask, plan: Plan, generator: torch.Generator) -> Rollout:
        """Sample completions of the plan's prompts and measure their rewards."""
        started = time.perf_counter()
        examples = [task.heldout(int(i)) if plan.heldout else task.train(int(i)) for i in plan.prompt_ids]
        prompts = [
            encode_prompt(self.tokenizer, example.prompt, self.config.chat_template) for example in examples
        ]
        config = self.scoring if plan.heldout else self.sampling
        counts = plan.counts.tolist()
        stored = self.config.stored and not plan.heldout
        if stored:
            completions = stored_completions(examples, counts, self.tokenizer, config.max_new_tokens)
        else:
            completions = self._sampled(prompts, plan, config, generator)
        texts = self._texts(completions)
        generated = time.perf_counter()
        of_row = [example for example, count in zip(examples, counts, strict=True) for _ in range(count)]
        scores = task.score(texts, of_row)
        if stored and (given := stored_scores(examples, counts)) is not None:
            scores.rewards[:, 0] = given
        metrics = {
            "time/generate": generated - started,
            "time/reward": time.perf_counter() - generated,
            "tokens": float(completions.mask.sum()),
            **{f"faults/{name}": float(count) for name, count in scores.faults.items()},
        }
        batch = self._batch(plan, prompts, completions, scores.rewards)
        batch.task = torch.tensor([example.task for example in of_row], dtype=torch.int64)
        batch.set_signal("format", scores.format_ok)
        batch.answer = torch.tensor([_answer_id(answer) for answer in scores.answers], dtype=torch.int64)
        if stored:
            # the policy that made them is unknown: the present one stands in its place
            known = evaluate_rows(
                self, batch, torch.arange(len(batch)), frozenset({"logp", "entropy"}), {}, Ranks()
            )
            batch.set_evaluated("old", known)
        samples = [
            {
                "prompt": of_row[i].prompt,
                "completion": texts[i],
                "answer": of_row[i].answer,
                "rewards": rewards,
            }
            for i, rewards in enumerate(scores.rewards[:SAMPLES].tolist())
        ]
        return Rollout(batch, metrics, samples)

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current policy's view of the completions' tokens."""
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=self.compute_dtype != getattr(torch, self.config.dtype)
        ):
            found = evaluate_completions(
                self.model,
                batch,
                requires - {"action_row"},
                temperature=self.config.temperature,
                tempered=options.get("temperature"),
                kept=options.get("kept"),
                value_head=dict(self.module.items()).get("critic"),
            )
        return replace(found, action_row=batch.payload["tokens"]) if "action_row" in requires else found

    def micro_batches(self, batch: Batch) -> list[Int[Tensor, " n"]]:
        """Rows in pieces of at most `micro_batch_tokens`, prompts shared inside a piece."""
        return micro_batches(
            batch.lengths, batch.payload["prompt_length"], batch.group, self.config.micro_batch_tokens
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model as it was loaded."""
        with self.language_model.reference():
            yield

    def observe(self, batch: Batch) -> dict[str, float]:
        """Nothing is remembered."""
        return {}

    def score(self, task: LanguageTask, batch: Batch) -> dict[str, float]:
        """Mean reward, pass@k, majority vote and each mixed task's mean of held-out completions, with 95 % intervals."""
        found = score_statistics(batch.rewards, batch.group, batch.answer, task.reward_names)
        for index, member in enumerate(task.members if isinstance(task, Mixture) else ()):
            mine = batch.task == index
            own = score_statistics(batch.rewards[mine, :1], batch.group[mine], batch.answer[mine], ("own",))
            found |= {f"score/{member.name}{end}": own[f"score{end}"] for end in ("", "/low", "/high")}
        return found | {"score/format": float(batch.signal("format").double().mean())}

    def _batch(
        self, plan: Plan, prompts: list[list[int]], completions: Completions, rewards: Tensor
    ) -> Batch:
        index = torch.arange(len(prompts)).repeat_interleave(plan.counts)
        length = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        padded = torch.zeros(len(prompts), int(length.max()) if len(prompts) else 0, dtype=torch.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        payload = {"prompt": padded[index], "prompt_length": length[index], "tokens": completions.tokens}
        batch = Batch(
            mask=completions.mask,
            old_logp=completions.logp,
            old_entropy=completions.entropy,
            rewards=rewards,
            group=index,
            prompt_id=plan.prompt_ids[index],
            terminated=completions.finished,
            truncated=~completions.finished,
            payload=TensorDict(payload, batch_size=[len(index)]),
            batch_size=[len(index)],
        )
        if self.sampling.truncates and not plan.heldout:
            batch.sampler_logp = completions.sampler_logp
        return batch

    def _sampled(
        self, prompts: list[list[int]], plan: Plan, config: SamplingConfig, generator: torch.Generator
    ) -> Completions:
        uniforms = torch.rand(plan.total, config.max_new_tokens, generator=generator, dtype=torch.float64)
        count = int(plan.counts.sum())
        return_free_memory()
        self.sampler.refresh()
        completions = self.sampler.sample(
            prompts, plan.counts.tolist(), config, uniforms[plan.first : plan.first + count]
        )
        self.sampler.release()
        return_free_memory()
        return completions

    def _texts(self, completions: Completions) -> list[str]:
        rows = [
            tokens[mask].tolist() for tokens, mask in zip(completions.tokens, completions.mask, strict=True)
        ]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []


def _answer_id(answer: str | None) -> int:
    if answer is None:
        return -1
    return int.from_bytes(hashlib.blake2b(answer.encode(), digest_size=8).digest(), "big") >> 1
