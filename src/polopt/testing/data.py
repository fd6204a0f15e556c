"""Batches and a policy to test methods with: small, ragged, and with every field that a part may require."""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int, Shaped
from tensordict import TensorDict
from torch import Tensor, nn

from polopt.batch import EVALUATED, OPTIONAL, Batch, Evaluation

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

OBSERVATION, VOCABULARY, WIDTH = 3, 5, 8


class TinyActor:
    """A policy over five tokens with a critic: evaluates everything that a part may require.

    Outside the mask its evaluation is NaN: nobody may read it.

    Args:
        seed: of the weights.
        noise: standard deviation of a second draw added to the weights, a policy that has moved.
        rows: trajectories of a micro-batch.
        dtype: precision of the weights.
    """

    def __init__(
        self, seed: int = 0, noise: float = 0.0, rows: int = 1000, dtype: torch.dtype = torch.float64
    ) -> None:
        self.rows = rows
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = {
                "trunk": nn.Sequential(nn.Linear(OBSERVATION, WIDTH), nn.Tanh()),
                "policy": nn.Linear(WIDTH, VOCABULARY),
                "critic": nn.Linear(WIDTH, 1),
                "median": nn.Linear(WIDTH, 1),
            }
            self.module = nn.ModuleDict(layers).double()
            moved = [noise * torch.randn_like(p) for p in self.module.parameters()]
        with torch.no_grad():
            for parameter, step in zip(self.module.parameters(), moved, strict=True):
                parameter.add_(step)
        self.module.to(dtype)

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The policy's view of the batch's tokens; `options`: `temperature`, `kept`."""
        mask = batch.mask
        tokens = torch.where(mask, batch.payload["tokens"], 0)
        observation = torch.where(mask[..., None], batch.payload["observation"], 0.0)
        hidden = self.module["trunk"](observation.to(next(self.module.parameters())))
        logits = self.module["policy"](hidden)
        logprobs, at = logits.log_softmax(-1), tokens[..., None]
        found = {
            "logp": logprobs.gather(-1, at)[..., 0],
            "entropy": -(logprobs.exp() * logprobs).sum(-1),
            "value": self.module["critic"](hidden)[..., 0],
            "median": self.module["median"](hidden)[..., 0],
        }
        found |= _replayed(logprobs, tokens, found["value"], found["median"])
        if "kl" in requires:
            old = torch.where(mask[..., None], batch.payload["old_logprobs"], 0.0).to(logprobs)
            found["kl"] = (logprobs.exp() * (logprobs - old)).sum(-1)
        with torch.no_grad():
            found["score_sqnorm"] = 1 - 2 * found["logp"].exp() + logprobs.exp().square().sum(-1)
            tempered = (logits / options.get("temperature", 1.0)).log_softmax(-1)
            found["tempered_logp"] = tempered.gather(-1, at)[..., 0]
            kept = logits.topk(min(options.get("kept", VOCABULARY), VOCABULARY))
            found |= {
                "features": hidden,
                "kept_logits": kept.values,
                "kept_rows": kept.indices,
                "action_row": tokens,
            }
        asked = {name: found[name] for name in sorted(requires & EVALUATED | {"logp"})}
        return Evaluation(**{name: outside(tensor, mask, torch.nan) for name, tensor in asked.items()})

    def micro_batches(self, batch: Batch) -> list[Int[Tensor, " n"]]:
        """The rows in order, `rows` at a time."""
        return list(torch.arange(len(batch)).split(self.rows))


def _replayed(logprobs: Tensor, tokens: Tensor, value: Tensor, median: Tensor) -> dict[str, Tensor]:
    """What off-policy losses read: the token after the one taken as the fresh one, and the two critics as twins."""
    following = ((tokens + 1) % VOCABULARY)[..., None]
    return {
        "fresh_logp": logprobs.gather(-1, following)[..., 0],
        "fresh_old_logp": (logprobs / 2).log_softmax(-1).gather(-1, following)[..., 0],
        "fresh_q": torch.stack([value + median, value - median], -1),
        "q": torch.stack([value, median], -1),
        "next_value": value.detach() / 2,
        "squared_outputs": logprobs.square().mean(-1),
    }


def outside(values: Shaped[Tensor, "N T ..."], mask: Tensor, filling: float) -> Shaped[Tensor, "N T ..."]:
    """`values` with `filling` where the mask is False; in tensors of integers -1 if it is no integer."""
    shaped = mask.view(mask.shape + (1,) * (values.dim() - mask.dim()))
    whole = abs(filling) < 2**31 and float(filling).is_integer()
    number = filling if values.is_floating_point() or whole else -1
    return torch.where(shaped, values, torch.tensor(number).to(values.dtype))


def random_batch(
    requires: frozenset[str] = frozenset(),
    *,
    seed: int = 0,
    groups: Sequence[int] = (4, 1, 3, 5),
    steps: int = 6,
    columns: int = 1,
    rewards: Literal["binary", "graded"] = "binary",
    options: dict[str, Any] | None = None,
) -> Batch:
    """A batch of a `TinyActor(0)`'s trajectories, in float64.

    Trajectories have 0 to `steps` decisions (one of them none), some with a gap; the rows of a group are scattered.

    Args:
        requires: what to add: optional fields, and `old_X`, `ref_X` for any X of `Evaluation`.
        seed: of everything drawn.
        groups: sizes of the groups.
        steps: T.
        columns: K, number of rewards.
        rewards: 0 or 1, or multiples of 1/1024 in [0, 1] that are all different.
        options: for the actor's evaluation.
    """
    draws = torch.Generator().manual_seed(seed)
    rows = sum(groups)
    order = torch.randperm(rows, generator=draws)
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))[order]
    mask = _ragged_mask(rows, steps, draws)
    drawn = torch.randperm(1024, generator=draws)[: rows * columns].view(rows, columns) / 1024
    values = drawn.double() if rewards == "graded" else (drawn > 0.5).double()
    observation = torch.randn(rows, steps, OBSERVATION, generator=draws, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (rows, steps), generator=draws)
    payload = {"observation": observation, "tokens": tokens, "row": torch.arange(rows)}
    batch = Batch(
        mask=mask, old_logp=torch.zeros(rows, steps, dtype=torch.float64), rewards=values, group=group,
        prompt_id=group + 100, payload=TensorDict(payload, [rows]), batch_size=[rows],
    )  # fmt: skip
    for name in sorted(requires & OPTIONAL):
        setattr(batch, name, _field(name, batch, draws))
    policies: dict[Literal["old", "ref"], TinyActor] = {"old": TinyActor(0), "ref": TinyActor(0, noise=0.3)}
    behaviour = policies["old"].module
    with torch.no_grad():
        logits = behaviour["policy"](behaviour["trunk"](observation))
        batch.payload["old_logprobs"] = logits.log_softmax(-1)
    for policy, actor in policies.items():
        asked = frozenset(name[4:] for name in requires if name.startswith(f"{policy}_")) & EVALUATED
        if asked or policy == "old":
            with torch.no_grad():
                batch.set_evaluated(policy, actor.evaluate(batch, asked, **(options or {})))
    return batch


def _ragged_mask(rows: int, steps: int, draws: torch.Generator) -> Tensor:
    lengths = torch.randint(1, steps + 1, (rows,), generator=draws)
    if rows > 2:
        lengths[rows // 2] = 0
    mask = torch.arange(steps) < lengths[:, None]
    if steps > 3:
        mask[::3, 1] = False  # as tool output between the policy's own tokens
    return mask


def _field(name: str, batch: Batch, draws: torch.Generator) -> Tensor:
    """Something plausible for an optional field."""
    rows, steps = batch.mask.shape
    match name:
        case "terminated" | "truncated":
            ended = torch.arange(rows) % 3 > 0
            return ended if name == "terminated" else ~ended
        case "turn":
            return torch.arange(steps).expand(rows, -1) // 2
        case "task":
            return batch.group % 2
        case "answer":
            return torch.randint(-1, 3, (rows,), generator=draws)
        case "policy_version":
            return torch.zeros(rows, dtype=torch.int64)
        case "last_value":
            return torch.randn(rows, generator=draws, dtype=torch.float64)
        case "scores":
            return torch.randn(rows, 1, 4, generator=draws, dtype=torch.float64)
        case "decision_scores" | "state_action":
            return torch.randn(rows, steps, 4, generator=draws, dtype=torch.float64)
    return 0.3 * torch.randn(rows, steps, generator=draws, dtype=torch.float64)


def batches(requires: frozenset[str] = frozenset(), **fixed: Any) -> "SearchStrategy[Batch]":
    """Hypothesis strategy for `random_batch`: any group sizes from 1, lengths, rewards and seeds.

    Args:
        requires: as for `random_batch`.
        **fixed: arguments of `random_batch` that do not vary.
    """
    from hypothesis import strategies as st

    varied = {
        "seed": st.integers(0, 2**31 - 1),
        "groups": st.lists(st.integers(1, 6), min_size=1, max_size=5),
        "steps": st.integers(1, 8),
        "rewards": st.sampled_from(["binary", "graded"]),
    }
    chosen = {name: strategy for name, strategy in varied.items() if name not in fixed}
    return st.builds(
        random_batch, st.just(requires), **chosen, **{k: st.just(deepcopy(v)) for k, v in fixed.items()}
    )
