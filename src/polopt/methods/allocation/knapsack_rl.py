r"""Knapsack RL - Unlocking Exploration of LLMs via Optimizing Budget Allocation (arXiv 2509.25849, ICML 2026).

A prompt whose rollouts all succeed or all fail has no gradient. The total number of rollouts of a batch stays fixed, but
each prompt gets its own, chosen to maximise the sum of learning values at the prompts' recent success rates.

.. math::
    P_{nz}(N, p) = 1 - p^N - (1-p)^N, \quad G(p) = p(1-p)^2, \quad \mathrm{Value}(N, p) = P_{nz}(N, p)\,G(p) \tag{1, 2, 3}

.. math::
    \max \sum_i \mathrm{Value}(N_i, p_i) \ \text{ s.t. } \sum_i N_i = N_{total},\ N_{low} \le N_i \le N_{up} \tag{4}

.. math::
    c(p) = \frac{\ln(1 - \alpha)}{\ln\max(p, 1-p)} \tag{5}

The value is concave in N, so giving one unit after the other to the largest marginal value solves (4)
(`variant="exact"`). `variant="reference"` is the published code, where a prompt's first extra unit also earns
Value(N_low, p). Cost (5) decides when the surplus goes to prompts not yet solved (fallback). RECONSTRUCTED: no candidate
for the fallback, and floors beyond the total, where the published code crashes.

Slots: budget with state; the recipe clips advantages to 5 (one success of N has (N-1)/sqrt(N)) and averages over all
tokens: with a mean per prompt larger groups would not take larger steps.

Use it when prompts vary widely in difficulty and are visited several times: over half of a uniform batch has no gradient
then. Not for a single epoch: estimates lag by one, and the first is uniform.

Pitfalls: average over all tokens or samples, not per prompt, or larger groups change nothing. One success of many has an
advantage of sqrt(N), hence the clip to 5. With no unsolved prompt the reference form gives the surplus to solved ones.
"""

import heapq
import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import AdvantageTransform, Budget, Draw
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def mixed_probability(n: Tensor | int, p: Float[Tensor, "*#M"]) -> Float[Tensor, "*#M"]:
    """Equation (1): probability that n rollouts at success rate p are not all alike; 0 at p = 0 and 1."""
    return torch.where((p > 0) & (p < 1), 1 - p**n - (1 - p) ** n, 0.0)


def information_gain(p: Float[Tensor, "*#M"]) -> Float[Tensor, "*#M"]:
    """Equation (2): gain of one policy-gradient step on the prompt's log-odds."""
    return p * (1 - p).square()


def value(n: Tensor | int, p: Float[Tensor, "*#M"]) -> Float[Tensor, "*#M"]:
    """Equation (3): learning value of n rollouts at success rate p, float64."""
    return mixed_probability(n, p.double()) * information_gain(p.double())


def cost(p: float, alpha: float, kind: Literal["probability", "expectation"] = "probability") -> float:
    """Equation (5): rollouts for a mixed group with probability alpha, or the expected number until both were seen."""
    if kind == "expectation":
        return 1 / (p * (1 - p)) - 1
    return math.log(1 - alpha) / math.log(max(p, 1 - p))


class Record(NamedTuple):
    """What is known of a prompt."""

    valid: bool
    """Enough rewards were seen."""
    p_hat: float
    """Recent success rate."""
    seen: int
    """Rewards seen, as far as they are kept."""


def success_rate(visits: list[list[float]], window: int = 16, min_count: int = 8) -> Record:
    """The record of a prompt from the 0/1 rewards of its visits, oldest first; rewards other than 1 count 0."""
    rewards = [[float(r == 1) for r in visit] for visit in visits]
    count = sum(map(len, rewards))
    if not count:
        return Record(min_count == 0, 0.0, 0)
    recent = rewards[-1] if len(rewards[-1]) >= window else [r for visit in rewards for r in visit][-window:]
    return Record(count >= min_count, sum(recent) / len(recent), count)


class Allocation(NamedTuple):
    """Rollouts of each prompt."""

    budget: Int[Tensor, " M"]
    fallback: bool
    """Surplus went to prompts that are not mixed, though mixed ones are there."""


def allocate(
    records: list[Record], total: int, uniform: int, *, low: int = 2, up: int = 128, negative: int = 2, positive: int = 2,
    alpha: float = 0.9, kind: Literal["probability", "expectation"] = "probability", fallback: bool = True,
    variant: Literal["exact", "reference"] = "exact",
) -> Allocation:  # fmt: skip
    """Equations (4) and (5) with the published order of steps.

    Raises:
        ConfigError: the floors exceed the total.
    """
    rates = [r.p_hat for r in records]
    mixed = [i for i, r in enumerate(records) if r.valid and 0 < r.p_hat < 1]
    unsolved = [i for i, p in enumerate(rates) if p == 0]
    budget = [
        (low if 0 < r.p_hat < 1 else negative if r.p_hat == 0 else positive) if r.valid else uniform
        for r in records
    ]
    left = total - sum(budget)
    if left < 0:
        raise ConfigError(
            f"budget knapsack: floors need {sum(budget)} rollouts of {total}; raise rollouts or lower low"
        )
    fell_back = False
    if not mixed:
        if left and not unsolved:
            return Allocation(torch.tensor(_spread([0] * len(records), total, range(len(records)))), False)
        return Allocation(torch.tensor(_spread(budget, left, unsolved)), False)
    need = sum(int(min(up, cost(rates[i], alpha, kind))) for i in mixed)
    others = unsolved or [i for i in range(len(records)) if i not in mixed]
    if fallback and need < left and others:
        budget, left, fell_back = _spread(budget, left - need, others), need, True
    extra = (_greedy if variant == "exact" else _reference)([rates[i] for i in mixed], left, low, up)
    for i, units in zip(mixed, extra, strict=True):
        budget[i] += units
    return Allocation(torch.tensor(_spread(budget, left - sum(extra), mixed)), fell_back)


def _spread(budget: list[int], units: int, places: Any) -> list[int]:
    """`units` shared evenly over the places in order, the first ones one more."""
    budget = list(budget)
    for number, i in enumerate(places):
        budget[i] += units // len(places) + (number < units % len(places))
    return budget


def _greedy(rates: list[float], units: int, low: int, up: int) -> list[int]:
    """One unit after the other to the largest marginal value; ties to the lower index."""

    def marginal(p: float, n: int) -> float:
        return (p**n * (1 - p) + (1 - p) ** n * p) * p * (1 - p) ** 2

    extra = [0] * len(rates)
    heap = [(-marginal(p, low), i) for i, p in enumerate(rates) if up > low]
    heapq.heapify(heap)
    for _ in range(units):
        if not heap:
            break
        _, i = heapq.heappop(heap)
        extra[i] += 1
        if low + extra[i] < up:
            heapq.heappush(heap, (-marginal(rates[i], low + extra[i]), i))
    return extra


def _reference(rates: list[float], units: int, low: int, up: int) -> list[int]:
    """The published dynamic programme: no extra unit is worth 0, k of them Value(low + k, p); exactly `units` if feasible."""
    most = up - low
    units = min(units, most * len(rates))
    steps = torch.arange(most + 1)
    best = torch.full((units + 1,), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    choices: list[Tensor] = []
    for p in rates:
        worth = torch.where(steps > 0, value(low + steps, torch.tensor([p], dtype=torch.float64)), 0.0)
        padded = torch.cat([torch.full((most,), -torch.inf, dtype=torch.float64), best])
        candidates = padded.unfold(0, most + 1, 1).flip(-1) + worth
        best, choice = _first_maximum(candidates)
        choices.append(choice)
    extra: list[int] = []
    for choice in reversed(choices):
        extra.append(int(choice[units]))
        units -= extra[-1]
    return extra[::-1]


def _first_maximum(candidates: Float[Tensor, "units k"]) -> tuple[Tensor, Tensor]:
    """Row maxima, and the smallest index that attains each."""
    best = candidates.amax(-1)
    return best, (candidates == best[:, None]).int().argmax(-1)


@register("knapsack")
class KnapsackBudget(Budget):
    """Rollouts by learning value at the recent success rates, equations (1) to (5)."""

    reconstructed = (
        "allocation where the published code crashes (no fallback candidate, floors beyond the total)"
    )

    class Config(Settings):
        """Options of the allocation."""

        low: int = Field(2, ge=1)
        """Rollouts of a prompt with mixed results, at least."""
        up: int = Field(128, ge=1)
        """Rollouts of a prompt, at most."""
        negative: int = Field(2, ge=0)
        """Floor of a prompt that has always failed."""
        positive: int = Field(2, ge=0)
        """Floor of a prompt that has always succeeded."""
        alpha: float = Field(0.9, gt=0, lt=1)
        """Probability of a mixed group in the cost (5)."""
        kind: Literal["probability", "expectation"] = "probability"
        """Which cost decides on the fallback."""
        fallback: bool = True
        """Give surplus to prompts that have never succeeded."""
        variant: Literal["exact", "reference"] = "exact"
        """Solve (4), or follow the published code."""
        window: int = Field(16, ge=1)
        """Rewards in the recent success rate."""
        min_count: int = Field(8, ge=0)
        """Rewards from which a prompt's rate counts."""
        success: float = 1.0
        """Outcome from which a rollout counts as a success."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.visits: dict[int, list[list[float]]] = {}

    def forward(self, prompt_ids: Int[Tensor, " P"], total: int, draw: Draw) -> Int[Tensor, " P"]:
        c = self.config
        records = [success_rate(self.visits.get(int(i), []), c.window, c.min_count) for i in prompt_ids]
        return allocate(
            records, total, total // max(1, len(records)), low=c.low, up=c.up, negative=c.negative, positive=c.positive,
            alpha=c.alpha, kind=c.kind, fallback=c.fallback, variant=c.variant,
        ).budget  # fmt: skip

    def observe(self, batch: Batch) -> None:
        success = (batch.outcome() >= self.config.success).double()
        for prompt in batch.prompt_id.unique().tolist():
            known = self.visits.setdefault(prompt, [])
            known.append(success[batch.prompt_id == prompt].tolist())
            self.visits[prompt] = _recent(known, self.config.window, self.config.min_count)

    def get_extra_state(self) -> dict[str, list[list[float]]]:
        """The rewards of each prompt."""
        return {str(prompt): visits for prompt, visits in self.visits.items()}

    def set_extra_state(self, state: dict[str, list[list[float]]]) -> None:
        """Take over the rewards of each prompt."""
        self.visits = {int(prompt): visits for prompt, visits in state.items()}


def _recent(visits: list[list[float]], window: int, min_count: int) -> list[list[float]]:
    """As many of the last visits as the rate and the count can depend on."""
    kept, count = 0, 0
    for visit in reversed(visits):
        kept, count = kept + 1, count + len(visit)
        if count >= max(window, min_count):
            break
    return visits[-kept:]


@register("clipped_advantage")
class ClippedAdvantage(AdvantageTransform):
    """Clips the advantages, which large groups need."""

    class Config(Settings):
        """Options of the clip."""

        bound: float = Field(5.0, gt=0)
        """Largest size of an advantage."""

    def forward(self, batch: Batch, advantages: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        return advantages.clamp(-self.config.bound, self.config.bound)


@register_recipe("knapsack_rl")
def knapsack_rl() -> Method:
    """Knapsack RL over GRPO with clip-higher and dual clip."""
    return Method(
        budget=KnapsackBudget(),
        advantage=[GroupStandardized(), ClippedAdvantage()],
        surrogate=PPOClip(clip_high=0.28, dual_clip=10),
        defaults={"minibatches": 8},
    )
