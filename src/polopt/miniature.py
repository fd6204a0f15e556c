"""A domain that learns in seconds: write tokens whose sum has the right remainder.

The goal is a number below `modulus`; the policy writes `length` tokens of a vocabulary of that size, and the reward is 1
if their sum leaves the goal as its remainder. The policy is a small tanh network over (goal, position, running sum). It
runs through the same trainer, engine and methods as every other domain, and serves tests and miniature reproductions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import one_hot

from polopt.batch import Batch, Evaluation
from polopt.domain import Plan, Rollout


class SumModTask:
    """Prompts are goals.

    Args:
        modulus: size of the vocabulary and of the goals' range.
        length: tokens of a completion.
        train_size: prompts of the pool; prompt i has the goal i mod `modulus`.
        second_reward: also reward completions whose first token is even, as a second reward function.
    """

    name = "sum_mod"

    def __init__(
        self, modulus: int = 6, length: int = 4, train_size: int = 60, second_reward: bool = False
    ) -> None:
        self.modulus, self.length = modulus, length
        self.train_size, self.heldout_size = train_size, 16 * modulus
        self.reward_names = ("sum", "even") if second_reward else ("sum",)

    def goals(self, prompt_ids: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """The goal of each prompt."""
        return prompt_ids % self.modulus

    def rewards(self, tokens: Int[Tensor, "N T"], goals: Int[Tensor, " N"]) -> Float[Tensor, "N K"]:
        """1 where the sum of the tokens leaves the goal; 1 where the first token is even."""
        right = tokens.sum(-1) % self.modulus == goals
        even = tokens[:, 0] % 2 == 0
        return torch.stack([right, even][: len(self.reward_names)], -1).double()

    def close(self) -> None:
        """Nothing is held."""


class SumModActor:
    """A tanh network with a policy head and a critic head.

    Args:
        task: fixes the sizes of the network.
        width: hidden units.
        dtype: precision.
        seed: of the initial weights.
        rows: trajectories evaluated at once.
    """

    domain = "miniature"
    exact_sampler = True

    def __init__(
        self,
        task: SumModTask,
        width: int = 48,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        rows: int = 10_000,
    ) -> None:
        self.modulus, self.length, self.rows = task.modulus, task.length, rows
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = nn.ModuleDict(
                {
                    "trunk": nn.Sequential(
                        nn.Linear(2 * task.modulus + task.length, width, dtype=dtype), nn.Tanh()
                    ),
                    "policy": nn.Linear(width, task.modulus, dtype=dtype),
                    "critic": nn.Linear(width, 1, dtype=dtype),
                }
            )
        self._initial = deepcopy(self.module)
        self._current = self.module
        self.provides = frozenset(Evaluation.__dataclass_fields__) | {
            "old_entropy", "old_value", "terminated", "truncated", "answer", "task",
        }  # fmt: skip

    def rollout(self, task: SumModTask, plan: Plan, generator: torch.Generator) -> Rollout:
        """Write completions; held-out ones greedily."""
        index = torch.arange(len(plan.prompt_ids)).repeat_interleave(plan.counts)
        goals = task.goals(plan.prompt_ids)[index]
        count = len(index)
        uniforms = torch.rand(plan.total, self.length, generator=generator, dtype=torch.float64)[
            plan.first :
        ][:count]
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        with torch.no_grad():
            for position in range(self.length):
                logits = self._logits(goals, tokens)[0][:, position]
                below = logits.softmax(-1).cumsum(-1) < uniforms[:, position, None]
                drawn = below.sum(-1).clamp(max=self.modulus - 1)
                tokens[:, position] = logits.argmax(-1) if plan.heldout else drawn
        batch = Batch(
            mask=torch.ones(count, self.length, dtype=torch.bool),
            old_logp=torch.zeros(count, self.length),
            rewards=task.rewards(tokens, goals),
            group=index,
            prompt_id=plan.prompt_ids[index],
            terminated=torch.ones(count, dtype=torch.bool),
            truncated=torch.zeros(count, dtype=torch.bool),
            answer=tokens.sum(-1) % self.modulus,
            task=goals % 2,
            payload=TensorDict({"goal": goals, "tokens": tokens}, batch_size=[count]),
            batch_size=[count],
        )
        with torch.no_grad():
            batch.set_evaluated("old", self.evaluate(batch, frozenset({"logp", "entropy", "value"})))
        samples = [
            {"prompt": int(g), "completion": t.tolist()} for g, t in zip(goals[:3], tokens[:3], strict=True)
        ]
        return Rollout(batch, {"tokens": float(count * self.length)}, samples)

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current network's view of the tokens."""
        tokens = batch.payload["tokens"]
        logits, value, hidden = self._logits(batch.payload["goal"], tokens)
        logprobs = logits.log_softmax(-1)
        probs = logprobs.exp()
        logp = logprobs.gather(-1, tokens[..., None])[..., 0]
        found = {"logp": logp, "value": value, "entropy": -(probs * logprobs).sum(-1)}
        found["action_row"] = tokens
        with torch.no_grad():
            found["score_sqnorm"] = 1 - 2 * logp.exp() + probs.square().sum(-1)
            if "tempered_logp" in requires:
                tempered = (logits / options["temperature"]).log_softmax(-1)
                found["tempered_logp"] = tempered.gather(-1, tokens[..., None])[..., 0]
            if requires & {"features", "kept_logits", "kept_rows"}:
                found["features"] = hidden.detach()
                kept = logits.detach().topk(min(options.get("kept", self.modulus), self.modulus))
                found |= {"kept_logits": kept.values, "kept_rows": kept.indices}
        return Evaluation(**{name: found[name] for name in requires | {"logp"}})

    def micro_batches(self, batch: Batch) -> list[Int[Tensor, " n"]]:
        """Rows in pieces of at most `rows`."""
        return list(torch.arange(len(batch)).split(self.rows))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The initial network."""
        self._current = self._initial
        try:
            yield
        finally:
            self._current = self.module

    def score(self, task: SumModTask, batch: Batch) -> dict[str, float]:
        """Share of right sums with its normal 95 % interval."""
        right = batch.rewards[:, 0]
        half = 1.96 * float((right.mean() * (1 - right.mean()) / len(right)).sqrt())
        mean = float(right.mean())
        return {"score": mean, "score/low": max(0.0, mean - half), "score/high": min(1.0, mean + half)}

    def _logits(self, goals: Int[Tensor, " N"], tokens: Int[Tensor, "N T"]) -> tuple[Tensor, Tensor, Tensor]:
        before = (tokens.cumsum(-1) - tokens) % self.modulus
        position = torch.arange(self.length).expand(len(tokens), -1)
        goal = goals[:, None].expand(-1, self.length)
        seen = [one_hot(goal, self.modulus), one_hot(position, self.length), one_hot(before, self.modulus)]
        net: Any = self._current
        hidden = net["trunk"](torch.cat(seen, -1).to(net["policy"].weight))
        return net["policy"](hidden), net["critic"](hidden)[..., 0], hidden
