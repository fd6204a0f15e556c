r"""MMR1 / VAS - Variance-Aware Sampling (arXiv 2509.21268, 2025).

Part of a batch's prompts is drawn in proportion to a variance promotion score, the variance of the prompt's outcomes plus
the diversity of its sampled chains, the rest uniformly for coverage. The scores come from rollouts of the whole pool,
repeated every few steps, that are not trained on.

.. math::
    P(x) = \frac1{n_s}\sum_i V(x, y_i), \quad OVS = P(1 - P), \quad VPS = \alpha\,OVS + \beta\,TDS \tag{1, 2, 5}

.. math::
    w = \frac{VPS - \min VPS}{\max VPS - \min VPS + 10^{-8}}, \quad w \leftarrow \mu w_{old} + (1 - \mu) w \tag{6, 7}

.. math::
    B_w = \lfloor\lambda B\rfloor \text{ drawn with replacement by } w, \quad B_r = B - B_w \text{ from a uniform stream} \tag{8}

TDS is one of: 1 - self-BLEU of orders 1 to 3 (3, 4; the published code adds self-BLEU itself, against the paper), the
share of distinct 3-grams, or the mean squared normalised edit distance. The uniform stream is one permutation of the
pool with a cursor; too few entries left sends it back to the start, the rest is skipped; after a refresh it stands at
B_r times the number of batches, modulo the pool (9). The pool is a random part of the task's prompts, at most `pool` of
them, since each is scored by n_s rollouts: 256 x 8 = 2048 before the first batch by default. The paper scores the whole
pool. With min-max weights the least valued prompt is never drawn by the weighted part; `normalize="none"` weights by
VPS itself, as the paper writes. RECONSTRUCTED: uniform draws when all weights are 0.

Slots: sampler with state. Refreshing costs pool x n_s rollouts: count them when comparing.

Use it when many prompts are solved always or never, and rollouts are cheap. Not for short runs: a refresh costs n_s
rollouts of each prompt of the pool, and pays only over the batches that follow. Prompts outside the pool are never drawn.

Pitfalls: the first reward is the correctness that is scored, not the total. With self-BLEU the diversity term reaches 1,
the variance 1/4: alpha = beta lets diversity dominate. `momentum=1` freezes the first weights. A prompt may come twice in
a batch, as two groups.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import exp, log
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.kl import KLPenalty
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Draw, Sampler
from polopt.registry import register, register_recipe

Diversity = Literal["self_bleu_123", "distinct_n", "edit"]
Chain = Sequence[int]


def ngrams(chain: Chain, order: int) -> Counter[tuple[int, ...]]:
    """How often each n-gram occurs in a chain of token ids."""
    return Counter(tuple(chain[i : i + order]) for i in range(len(chain) - order + 1))


def bleu(hypothesis: Chain, references: Sequence[Chain], orders: int = 3) -> float:
    """Equation (4): BLEU of one chain against several, numerators of order 2 and 3 smoothed to 0.1 where they are 0."""
    if not hypothesis:
        return 0.0
    total = 0.0
    for order in range(1, orders + 1):
        counts, best = ngrams(hypothesis, order), Counter[tuple[int, ...]]()
        for reference in references:
            best |= ngrams(reference, order)
        matched = (counts & best).total()
        if order == 1 and not matched:
            return 0.0
        total += log((matched or 0.1) / max(1, counts.total()))
    length = len(hypothesis)
    closest = min((len(r) for r in references), key=lambda r: (abs(r - length), r))
    return exp(total / orders) * (1.0 if length > closest else exp(1 - closest / length))


def self_bleu(chains: Sequence[Chain]) -> float:
    """Mean BLEU of each chain against all the others; 1 for a single chain, which has no diversity."""
    if len(chains) < 2:
        return 1.0
    scores = [bleu(chain, [*chains[:i], *chains[i + 1 :]]) for i, chain in enumerate(chains)]
    return sum(scores) / len(scores)


def distinct(chains: Sequence[Chain], order: int = 3) -> float:
    """Distinct n-grams over n-grams, pooled; 0 if there is none."""
    pooled = sum((ngrams(chain, order) for chain in chains), Counter[tuple[int, ...]]())
    return len(pooled) / pooled.total() if pooled else 0.0


def edit_distance(a: Chain, b: Chain) -> int:
    """Levenshtein distance in tokens."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def edit_diversity(chains: Sequence[Chain]) -> float:
    """Mean squared edit distance over pairs, each normalised by the longer chain."""
    pairs = [(a, b) for i, a in enumerate(chains) for b in chains[:i]]
    if not pairs:
        return 0.0
    return sum((edit_distance(a, b) / max(len(a), len(b), 1)) ** 2 for a, b in pairs) / len(pairs)


def diversity(chains: Sequence[Chain], metric: Diversity) -> float:
    """Equation (3): TDS in [0, 1], larger is more diverse."""
    match metric:
        case "self_bleu_123":
            return 1 - self_bleu(chains)
        case "distinct_n":
            return distinct(chains)
        case "edit":
            return edit_diversity(chains)


def outcome_variance(pass_rate: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Equation (2)."""
    return pass_rate * (1 - pass_rate)


def sampling_weights(
    vps: Float[Tensor, " D"], normalize: Literal["minmax", "none"] = "minmax", eps: float = 1e-8
) -> Float[Tensor, " D"]:
    """Equation (6)."""
    if normalize == "none":
        return vps
    return (vps - vps.min()) / (vps.max() - vps.min() + eps)


def momentum_update(
    old: Float[Tensor, " D"], new: Float[Tensor, " D"], momentum: float
) -> Float[Tensor, " D"]:
    """Equation (7)."""
    return momentum * old + (1 - momentum) * new


def split_counts(batch: int, ratio: float) -> tuple[int, int]:
    """Equation (8): how many prompts are drawn by weight, and how many uniformly."""
    weighted = int(ratio * batch)
    return weighted, batch - weighted


def uniform_stream(
    permutation: Int[Tensor, " D"], cursor: int, count: int
) -> tuple[Int[Tensor, " count"], int]:
    """Equation (9): the next entries of the permutation, and where it stands then; too few left: from the start."""
    if cursor + count > len(permutation):
        cursor = 0
    taken = permutation[cursor : cursor + count]
    if len(taken) < count:
        taken = permutation.repeat(-(-count // len(permutation)))[:count]
    return taken, cursor + count


@register("vas")
class VarianceAware(Sampler):
    """Draws prompts by variance promotion score and uniformly, equations (1) to (9)."""

    grows = ("weights",)
    weights: Tensor
    calls: Tensor
    cursor: Tensor
    reconstructed = "uniform draws when all weights are equal"
    domains = frozenset({"language", "miniature"})

    class Config(Sampler.Config):
        """Options of the sampler."""

        ratio: float = Field(0.5, ge=0, le=1)
        """lambda: share of the batch drawn by weight."""
        alpha: float = Field(0.8, ge=0)
        """Weight of the outcome variance (at most 1/4)."""
        beta: float = Field(0.2, ge=0)
        """Weight of the trajectory diversity (at most 1)."""
        metric: Diversity = "self_bleu_123"
        """Measure of the diversity of a prompt's chains."""
        pool: int = Field(256, ge=1)
        """D, prompts that are scored and drawn from: so many of the task's, at random, or all if there are fewer."""
        scoring_rollouts: int = Field(8, ge=1)
        """n_s, rollouts of each prompt of the pool per refresh; 8 to 32."""
        update_every: int = Field(35, ge=1)
        """Iterations between refreshes; 28 to 56."""
        momentum: float = Field(0.0, ge=0, le=1)
        """mu: share of the old weights that is kept; 1 freezes them."""
        normalize: Literal["minmax", "none"] = "minmax"
        """Weights by min-max of the scores (code) or the scores themselves (paper)."""
        success: float = 1.0
        """Value of the first reward from which a rollout counts as correct."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    def to_score(
        self, pool_size: int, of_epoch: Callable[[int], torch.Generator]
    ) -> tuple[Int[Tensor, " P"], int] | None:
        if int(self.calls) % self.config.update_every:
            return None
        return self._pool(pool_size, of_epoch).sort().values, self.config.scoring_rollouts

    def _pool(self, size: int, of_epoch: Callable[[int], torch.Generator]) -> Int[Tensor, " D"]:
        """The prompts that are drawn from, in the order of the uniform stream."""
        return torch.randperm(size, generator=of_epoch(0))[: self.config.pool]

    def take_scores(self, batch: Batch) -> None:
        c, groups = self.config, Groups.of(batch.prompt_id)
        tokens = batch.payload["tokens"]
        chains: list[list[Chain]] = [[] for _ in range(len(groups.size))]
        for prompt, row, mask in zip(groups.index.tolist(), tokens, batch.mask, strict=True):
            chains[prompt].append(row[mask].tolist())
        tds = torch.tensor([diversity(found, c.metric) for found in chains], dtype=torch.float64)
        pass_rate = groups.mean((batch.rewards[:, 0] >= c.success).double())
        new = sampling_weights(c.alpha * outcome_variance(pass_rate) + c.beta * tds, c.normalize)
        self.weights = momentum_update(self.weights, new, c.momentum) if len(self.weights) else new

    def forward(
        self, pool_size: int, count: int, of_epoch: Callable[[int], torch.Generator], draw: Draw
    ) -> Int[Tensor, " P"]:
        weighted, uniform = split_counts(count, self.config.ratio)
        pool = self._pool(pool_size, of_epoch)
        if int(self.calls) % self.config.update_every == 0:  # the scores have just been refreshed
            self.cursor.fill_(int(self.calls) * uniform % len(pool))
        taken, cursor = uniform_stream(pool, int(self.cursor), uniform)
        self.cursor.fill_(cursor)
        self.calls += 1
        if not weighted:
            return taken
        weights = self.weights if self.weights.sum() > 0 else torch.ones(len(pool), dtype=torch.float64)
        drawn = torch.multinomial(
            weights, weighted, replacement=True, generator=draw(f"vas {int(self.calls)}")
        )
        place = torch.argsort(torch.cat([torch.arange(weighted) * 2, torch.arange(uniform) * 2 + 1]))
        return torch.cat([pool.sort().values[drawn], taken])[place]


@register_recipe("mmr1_vas")
def mmr1_vas() -> Method:
    """Variance-aware sampling over GRPO with a KL of 0.01 in the loss."""
    return Method(
        sampler=VarianceAware(),
        advantage=GroupStandardized(),
        surrogate=PPOClip(aggregation="sequence_mean"),
        regularizers=[KLPenalty(coef=0.01)],
    )
