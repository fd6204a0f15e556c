"""A domain that learns in seconds: write tokens whose sum has the right remainder.

The goal is a number below `modulus`; the policy writes `length` tokens of a vocabulary of that size, and the reward is 1
if their sum leaves the goal as its remainder. A prompt may ask for several such parts in a row: then the sum of all
tokens so far must be right after each of them, and chance succeeds in `modulus ** -parts` of the cases. The policy is a
small tanh network over (goal, parts, position, running sum). It runs through the same trainer, engine and methods as
every other domain, and serves tests, miniature reproductions and comparisons.
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

from polopt.batch import EVALUATED, OFF_POLICY, Batch, Evaluation
from polopt.domain import Plan, Rollout, Task

PROVIDES = EVALUATED - OFF_POLICY - {"kl", "median"} | {
    "old_entropy", "old_value", "terminated", "truncated", "answer", "task",
}  # fmt: skip
"""What the actor can evaluate, and what its rollouts carry."""


class SumModTask(Task):
    """Prompts are goals.

    Args:
        modulus: size of the vocabulary and of the goals' range.
        length: tokens of each part of a completion.
        train_size: prompts of the pool; prompt i has the goal i mod `modulus`.
        second_reward: also reward completions whose first token is even, as a second reward function.
        parts: parts of a completion.
        mixed: the prompts of each goal ask for 1, 2, ... `parts` parts in turn, instead of all for `parts`.
    """

    name = "sum_mod"

    def __init__(
        self,
        modulus: int = 6,
        length: int = 4,
        train_size: int = 60,
        second_reward: bool = False,
        parts: int = 1,
        mixed: bool = False,
    ) -> None:
        self.modulus, self.part_length, self.length = modulus, length, length * parts
        self.most_parts, self.levels = parts, parts if mixed else 1
        self.train_size, self.heldout_size = train_size, 16 * modulus * self.levels
        self.reward_names = ("sum", "even") if second_reward else ("sum",)

    def goals(self, prompt_ids: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """The goal of each prompt."""
        return prompt_ids % self.modulus

    def parts(self, prompt_ids: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """How many parts each prompt asks for."""
        return self.most_parts - (prompt_ids // self.modulus) % self.levels

    def rewards(self, tokens: Int[Tensor, "N T"], prompt_ids: Int[Tensor, " N"]) -> Float[Tensor, "N K"]:
        """1 where after each part the sum of the tokens leaves the goal; 1 where the first token is even."""
        sums = tokens.cumsum(-1)[:, self.part_length - 1 :: self.part_length] % self.modulus
        asked = torch.arange(self.most_parts) < self.parts(prompt_ids)[:, None]
        right = ((sums == self.goals(prompt_ids)[:, None]) | ~asked).all(-1)
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
        sampled_scores: held-out completions are sampled, instead of the likeliest tokens.
    """

    domain = "miniature"
    exact_sampler = True
    own_rollouts = True
    independent_decisions = False

    def __init__(
        self,
        task: SumModTask,
        width: int = 48,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        rows: int = 10_000,
        sampled_scores: bool = False,
    ) -> None:
        self.modulus, self.length, self.rows = task.modulus, task.length, rows
        self.levels, self.greedy_scores = task.levels, not sampled_scores
        inputs = 2 * task.modulus + task.length + task.levels - 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = nn.ModuleDict(
                {
                    "trunk": nn.Sequential(nn.Linear(inputs, width, dtype=dtype), nn.Tanh()),
                    "policy": nn.Linear(width, task.modulus, dtype=dtype),
                    "critic": nn.Linear(width, 1, dtype=dtype),
                }
            )
        self._initial = deepcopy(self.module)
        self._current = self.module
        self.provides = PROVIDES

    def rollout(self, task: SumModTask, plan: Plan, generator: torch.Generator) -> Rollout:
        """Write completions; held-out ones with the likeliest tokens, unless scores are sampled."""
        index = torch.arange(len(plan.prompt_ids)).repeat_interleave(plan.counts)
        goals, parts = task.goals(plan.prompt_ids)[index], task.parts(plan.prompt_ids)[index]
        mask = torch.arange(self.length) < (parts * task.part_length)[:, None]
        count = len(index)
        uniforms = torch.rand(plan.total, self.length, generator=generator, dtype=torch.float64)[
            plan.first :
        ][:count]
        tokens = torch.zeros(count, self.length, dtype=torch.int64)
        with torch.no_grad():
            for position in range(self.length):
                logits = self._logits(goals, parts, tokens)[0][:, position]
                below = logits.softmax(-1).cumsum(-1) < uniforms[:, position, None]
                drawn = below.sum(-1).clamp(max=self.modulus - 1)
                tokens[:, position] = logits.argmax(-1) if plan.heldout and self.greedy_scores else drawn
        tokens = torch.where(mask, tokens, 0)
        batch = Batch(
            mask=mask,
            old_logp=torch.zeros(count, self.length),
            rewards=task.rewards(tokens, plan.prompt_ids[index]),
            group=index,
            prompt_id=plan.prompt_ids[index],
            terminated=torch.ones(count, dtype=torch.bool),
            truncated=torch.zeros(count, dtype=torch.bool),
            answer=tokens.sum(-1) % self.modulus,
            task=goals % 2,
            payload=TensorDict({"goal": goals, "parts": parts, "tokens": tokens}, batch_size=[count]),
            batch_size=[count],
        )
        with torch.no_grad():
            batch.set_evaluated("old", self.evaluate(batch, frozenset({"logp", "entropy", "value"})))
        samples = [
            {"prompt": int(goals[i]), "completion": tokens[i][mask[i]].tolist()} for i in range(min(3, count))
        ]
        return Rollout(batch, {"tokens": float(mask.sum())}, samples)

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current network's view of the tokens."""
        tokens = batch.payload["tokens"]
        logits, value, hidden = self._logits(batch.payload["goal"], batch.payload["parts"], tokens)
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

    def observe(self, batch: Batch) -> dict[str, float]:
        """Nothing is remembered."""
        return {}

    def score(self, task: SumModTask, batch: Batch) -> dict[str, float]:
        """Share of completions that earn every reward, with its normal 95 % interval."""
        right = (batch.rewards == 1).all(-1).double()
        half = 1.96 * float((right.mean() * (1 - right.mean()) / len(right)).sqrt())
        mean = float(right.mean())
        return {"score": mean, "score/low": max(0.0, mean - half), "score/high": min(1.0, mean + half)}

    def _logits(
        self, goals: Int[Tensor, " N"], parts: Int[Tensor, " N"], tokens: Int[Tensor, "N T"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = (tokens.cumsum(-1) - tokens) % self.modulus
        position = torch.arange(self.length).expand(len(tokens), -1)
        goal = goals[:, None].expand(-1, self.length)
        level = parts[:, None].expand(-1, self.length) % self.levels
        seen = [
            one_hot(goal, self.modulus), one_hot(position, self.length), one_hot(before, self.modulus),
            one_hot(level, self.levels)[..., 1:],
        ]  # fmt: skip
        net: Any = self._current
        hidden = net["trunk"](torch.cat(seen, -1).to(net["policy"].weight))
        return net["policy"](hidden), net["critic"](hidden)[..., 0], hidden
