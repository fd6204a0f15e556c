"""Occupancy penalty - the reward less the log occupancy ratio to a reference policy (arXiv 2403.03185, 2024).

The shaping part of `orpo_chi2` for any domain, with the equation numbers of that file. Reference steps are kept from a
file or from the first iteration. Each iteration the discriminator goes on learning to tell its steps from them; then every
step pays for where the current policy goes more often than the reference.

Slots: shaping `occupancy` (5) to (8).

Use it when the reward is a proxy and some policy that is known to be sane can be run; not when it never visits what you
want to reach.

Pitfalls: the divergence is that of what `features` describes, states alone by default; the discriminator's samples are
not discounted; the first iteration without a file is not penalised.
"""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import ConfigError
from polopt.functional.masked import masked_mean, zero_outside
from polopt.functional.returns import outcome_at_last
from polopt.methods.preference.orpo_discriminator import (
    Discriminator,
    Divergence,
    initial_weights,
    occupancy_penalty,
    perceptron,
    perceptron_shapes,
    train_discriminator,
)
from polopt.parts import Draw, Shaping
from polopt.registry import register
from polopt.settings import Settings


@register("occupancy")
class OccupancyPenalty(Shaping):
    """A discriminator's penalty on steps that the reference policy would rarely take, equations (5) to (8)."""

    reconstructed = "reference steps are kept, not collected anew every iteration"
    grows = ("weights", "mean", "square", "reference")
    weights: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    reference: Tensor
    reward_std: Tensor

    class Config(Settings):
        """Options of the penalty and of the discriminator."""

        kind: Divergence = "sqrt_chi2"
        """Divergence between the occupancy measures."""
        coef: float = Field(0.1, ge=0)
        """Lambda: reward units per unit of divergence, times the proxy's deviation if `scale_free`; 0.01 to 1."""
        scale_free: bool = True
        """Multiply `coef` by the standard deviation of the proxy reward per step under the reference."""
        reward_clip: float = Field(1000.0, gt=0)
        """Largest penalty of a step in reward units (paper: 1 to 1e10 by environment)."""
        trim_fraction: float = Field(0.01, ge=0, lt=0.5)
        """Share of the steps dropped at either end before the mean under the root."""
        features: str = "ref_features"
        """Batch field or signal [N, T, F] that describes each step: `ref_features`, what the reference's last layer sees
        of the state, or one with the action in it."""
        reference: str | None = None
        """File in the safetensors format with a batch of the reference's rollouts (`Batch.to_tensors`); if not given, the
        first iteration's steps, whose policy is the reference."""
        capacity: int = Field(20_000, ge=1)
        """Reference steps that are kept."""
        width: int = Field(256, ge=1)
        """Units of a hidden layer."""
        layers: int = Field(2, ge=0)
        """Hidden layers."""
        epochs: int = Field(8, ge=0)
        """Passes over the current steps before the discriminator is used; as many as the policy's."""
        minibatch: int = Field(128, ge=1)
        """Current steps of a discriminator update, against as many reference steps."""
        lr: float = Field(1e-3, gt=0)
        """Adam's step size."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.requires = frozenset({self.config.features})
        for name in ("weights", "mean", "square"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("reference", torch.zeros(0, 0))
        self.register_buffer("reward_std", torch.zeros((), dtype=torch.float64))
        self._next: dict[str, Tensor] = {}

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        self._next = {}
        current = self._features(batch)
        if not len(current):
            return batch
        generator = draw("occupancy")
        reference, reward_std = self._reference(batch, generator)
        self._next = {"reference": reference, "reward_std": reward_std}
        if not len(self.reference) and self.config.reference is None:
            return self._with_penalty(batch, torch.zeros(batch.mask.shape, dtype=torch.float64))
        if reference.shape[1] != current.shape[1]:
            raise ConfigError(
                f"shaping occupancy: reference steps have {reference.shape[1]} features of {self.config.features!r}, "
                f"current ones {current.shape[1]}; record both with the same policy"
            )
        scores = self._scores(current, reference, generator)
        penalty = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
        penalty[batch.mask] = self._penalty(scores, reward_std)
        return self._with_penalty(batch, penalty)

    def _with_penalty(self, batch: Batch, penalty: Float[Tensor, "N T"]) -> Batch:
        earned = 0.0 if batch.step_rewards is None else zero_outside(batch.step_rewards, batch.mask)
        batch = batch.clone(recurse=False)
        batch.step_rewards = (earned + penalty.to(batch.mask.device)).to(batch.old_logp)
        return batch

    def observe(self, batch: Batch) -> None:
        # what the iteration learned becomes state here, so that preparing a batch twice is safe
        for name, value in self._next.items():
            setattr(self, name, value)
        self._next = {}

    def _scores(self, current: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
        """Log occupancy ratio of each current step, by a discriminator trained on them first."""
        c = self.config
        shapes = perceptron_shapes(current.shape[1], c.width, c.layers)
        weights, mean, square = (buffer.to(current) for buffer in (self.weights, self.mean, self.square))
        start = Discriminator(weights, mean, square, self.steps)
        if not len(self.weights):
            weights = initial_weights(shapes, generator).to(current)
            start = Discriminator(weights, torch.zeros_like(weights), torch.zeros_like(weights), self.steps)
        trained = train_discriminator(
            start, current, reference, shapes, generator,
            kind=c.kind, epochs=c.epochs, minibatch=c.minibatch, lr=c.lr,
        )  # fmt: skip
        self._next |= trained._asdict()
        return perceptron(trained.weights, current, shapes)

    def _penalty(self, scores: Tensor, reward_std: Tensor) -> Tensor:
        c = self.config
        coef = c.coef * reward_std if c.scale_free else c.coef
        return occupancy_penalty(scores.double(), c.kind, coef, c.reward_clip, c.trim_fraction)

    def _reference(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Kept reference steps [m, F] and the standard deviation of their rewards."""
        if len(self.reference):
            device = batch.old_logp.device
            return self.reference.to(device), self.reward_std.to(device)
        recorded = batch if self.config.reference is None else self._recorded()
        features, rewards = self._features(recorded), _rewards_per_step(recorded)
        if not len(features):
            raise ConfigError(f"shaping occupancy.reference = {self.config.reference!r}: has no decisions")
        kept = torch.randperm(len(features), generator=generator)[: self.config.capacity].sort().values
        std = (rewards - masked_mean(rewards, recorded.mask))[recorded.mask].square().mean().sqrt()
        return features[kept].to(batch.old_logp.device), std.to(batch.old_logp.device)

    def _recorded(self) -> Batch:
        from safetensors.torch import load_file

        path = Path(self.config.reference)
        if not path.is_file():
            raise ConfigError(
                f"shaping occupancy.reference = {str(path)!r}: no such file; record a rollout there"
            )
        return Batch.from_tensors(load_file(path))

    def _features(self, batch: Batch) -> Float[Tensor, "n F"]:
        name = self.config.features
        found = getattr(batch, name, None)
        found = batch.signal(name) if found is None else found
        return cast(Tensor, found).detach()[batch.mask].float()


def _rewards_per_step(batch: Batch) -> Float[Tensor, "N T"]:
    """Everything each decision earned, the trajectory's own reward at the last one; float64."""
    rewards = outcome_at_last(batch.rewards.detach().double().nan_to_num(0.0, 0.0, 0.0).sum(-1), batch.mask)
    if batch.step_rewards is None:
        return rewards
    return rewards + zero_outside(batch.step_rewards.detach().double(), batch.mask)
