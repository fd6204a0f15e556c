"""How a method is put together: a part in each slot (`parts.py`), and the loss that they make.

A part is registered by name in its slot and a recipe, which is a paper's whole method, among the recipes:

    method = polopt.recipe("grpo", surrogate="etr", regularizers=["kl:coef=0.01"])
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.batch import EVALUATED, OFF_POLICY, Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.masked import given_to_decisions, zero_outside
from polopt.parts import (
    MANY,
    SLOTS,
    Advantage,
    AdvantageTransform,
    Budget,
    Draw,
    Optimizer,
    Part,
    Regularizer,
    Sampler,
    Selection,
    Shaping,
    Surrogate,
)


class Method(nn.Module):
    """A policy-optimization method: a value for each slot.

    Args:
        name: under what it is reported.
        advantage: an estimator, or an estimator followed by transforms.
        surrogate: the loss.
        sampler, budget, selection, optimizer: the classic filling if not given.
        shaping, regularizers: none if not given.
        defaults: fields of `TrainerConfig` that the method's paper fixes (`epochs`, `minibatches`); a run's own settings
            override them.

    Raises:
        ConfigError: a part sits in the wrong slot, or needs a signal that no part provides.
    """

    def __init__(
        self,
        *,
        advantage: Advantage | Sequence[Advantage | AdvantageTransform],
        surrogate: Surrogate,
        sampler: Sampler | None = None,
        budget: Budget | None = None,
        shaping: Sequence[Shaping] = (),
        selection: Selection | None = None,
        regularizers: Sequence[Regularizer] = (),
        optimizer: Optimizer | None = None,
        name: str = "custom",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.defaults = dict(defaults or {})
        self.sampler = sampler or Sampler()
        self.budget = budget or Budget()
        self.shaping = nn.ModuleList(shaping)
        self.advantage = nn.ModuleList([advantage] if isinstance(advantage, Part) else advantage)
        self.selection = selection or Selection()
        self.surrogate = surrogate
        self.regularizers = nn.ModuleList(regularizers)
        self.optimizer = optimizer or Optimizer()
        self._check()

    def slot(self, name: str) -> list[Part]:
        """The parts in a slot."""
        filling = getattr(self, name)
        return list(filling) if name in MANY else [filling]

    @cached_property
    def parts(self) -> list[Part]:
        """All parts, in the order of the data."""
        return [part for slot in SLOTS for part in self.slot(slot)]

    @property
    def requires(self) -> frozenset[str]:
        """Everything the parts read beyond the batch's constant fields and each other's signals."""
        return frozenset().union(*(p.requires for p in self.parts)) - self.provides

    @property
    def provides(self) -> frozenset[str]:
        """Signals that the parts give each other."""
        return frozenset().union(*(p.provides for p in self.parts))

    @cached_property
    def evaluated(self) -> frozenset[str]:
        """What the loss needs of the current policy, with gradient."""
        loss = [self.surrogate, *self.regularizers]
        return frozenset({"logp"}).union(*(cast(Part, p).requires & EVALUATED for p in loss))

    @cached_property
    def off_policy(self) -> bool:
        """The loss reads what is evaluated of decisions from a replay buffer alone."""
        return bool(self.evaluated & OFF_POLICY)

    @cached_property
    def separable(self) -> bool:
        """The loss is a sum over trajectories, given `loss_weight`."""
        rows = self.surrogate.coupling in ("decision", "sequence")
        return rows and all(cast(Regularizer, r).separable for r in self.regularizers)

    @property
    def decision_wise(self) -> bool:
        """The loss is a mean over decisions, each of which may stand alone."""
        alone = self.surrogate.coupling == "decision" and self.surrogate.config.aggregation == "token_mean"
        return alone and self.separable

    def evaluation_options(self) -> dict[str, Any]:
        """The parts' options for the actor's evaluation."""
        return {key: value for part in self.parts for key, value in part.evaluation_options().items()}

    @torch.no_grad()
    def prepare(self, batch: Batch, draw: Draw) -> Batch:
        """Everything that sees the whole iteration: shaping, advantages, weights, signals.

        Rewards that are not finite count as missing. A trajectory without any reward is dropped: nothing is known of it.

        Returns:
            The trajectories left, with `advantages`, `weights` and `signals`, and zeros wherever `mask` is False.
        """
        batch = _with_finite_rewards(batch)
        for shaping in self.shaping:
            batch = shaping(batch, draw)
        if self.selection.before_advantage:
            batch.weights = _per_decision(self.selection(batch, draw), batch)
            batch = batch[batch.weights.any(-1)]
        estimator, *transforms = self.advantage
        batch.advantages = _per_decision(estimator(batch), batch)
        for transform in transforms:
            batch.advantages = _per_decision(transform(batch, batch.advantages), batch)
        if not self.selection.before_advantage:
            batch.weights = _per_decision(self.selection(batch, draw), batch)
        for part in self.parts:
            for name, signal in part.signals(batch).items():
                batch.set_signal(name, signal.to(batch.old_logp) if signal.is_floating_point() else signal)
        return batch

    def objective(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        """The loss of a minibatch as a function of the current policy's view of it; the batch is constant."""
        evaluation = evaluation.where(batch.mask)
        compiling = torch.compiler.is_compiling()  # then the batch is an input, which no gradient leaves
        if not compiling and any(tensor.requires_grad for tensor in batch.values(True, True)):
            batch = batch.detach()
        loss = self.surrogate(evaluation, batch)
        for regularizer in self.regularizers:
            loss = loss + regularizer(evaluation, batch)
        return loss

    def with_parts(self, **slots: Any) -> Self:
        """The same method with other parts in some slots; slots that take several get a list."""
        filled: dict[str, Any] = {
            slot: self.slot(slot) if slot in MANY else getattr(self, slot) for slot in SLOTS
        } | slots
        changes = [
            f"{slot}={','.join(p.name for p in (f if slot in MANY else [f]))}" for slot, f in slots.items()
        ]
        return type(self)(**filled, name="+".join([self.name, *changes]), defaults=self.defaults)

    def _check(self) -> None:
        for slot, base in SLOTS.items():
            for part in self.slot(slot):
                fits = isinstance(part, (base, AdvantageTransform) if slot == "advantage" else base)
                if not fits:
                    raise ConfigError(f"{slot}: {type(part).__name__} is no {base.__name__} part")
        if not self.advantage:
            raise ConfigError("advantage: the slot is empty; name an estimator")
        estimator, *transforms = self.slot("advantage")
        if isinstance(estimator, AdvantageTransform):
            raise ConfigError(
                f"advantage {estimator.name}: changes another advantage; name an estimator before it"
            )
        for part in transforms:
            if not isinstance(part, AdvantageTransform):
                raise ConfigError(f"advantage {part.name}: is an estimator of its own; a method has one")
        behaviour = {f"{policy}_{name}" for policy in ("old", "ref") for name in EVALUATED}
        known = EVALUATED | set(Batch.__dataclass_fields__) | behaviour | self.provides
        for part in self.parts:
            for name in sorted(part.requires - known):
                raise ConfigError(
                    f"{part.slot} {part.name}: needs the signal {name!r}, which no part here provides"
                )


def _with_finite_rewards(batch: Batch) -> Batch:
    # finite in the precision of the loss: 1e300 is no number to a float32
    rewards = torch.where(batch.rewards.to(batch.old_logp).isfinite(), batch.rewards, torch.nan)
    known = ~rewards.isnan().all(-1)
    if batch.step_rewards is not None:
        known |= batch.mask.any(-1)
    payload = batch.payload
    batch = batch.apply(
        lambda t: zero_outside(t, batch.mask) if t.shape == batch.mask.shape and t.is_floating_point() else t
    )
    batch.rewards, batch.payload = rewards, payload
    return batch[known]


def _per_decision(values: Tensor, batch: Batch) -> Float[Tensor, "N T"]:
    values = values.to(batch.old_logp)
    if values.shape[1] == 1:
        return given_to_decisions(values, batch.mask)
    return zero_outside(values, batch.mask).contiguous()
