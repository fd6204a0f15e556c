"""Sizes and lengths of a run. Apart from the trainer, so that a configuration is checked without importing torch."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field

from polopt.settings import Settings


class TrainerConfig(Settings):
    """How long, how much and how far. Fields that a method's paper fixes are the defaults of its recipe."""

    iterations: int = Field(default=20, ge=0)
    """Rollouts followed by updates."""
    prompts: int = Field(default=16, ge=1)
    """Prompts or start states of an iteration."""
    rollouts: int = Field(default=8, ge=1)
    """Rollouts of each prompt on average; the budget slot shares out `prompts * rollouts`."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's data."""
    replay: int = Field(default=1, ge=1)
    """Iterations whose data an update draws from, each against its own behaviour policy; 1: the present one's only."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps of a pass."""
    buffer_size: int = Field(default=0, ge=0)
    """Decisions kept for replay, from which every update draws, for off-policy methods; 0: none."""
    batch_size: int = Field(default=256, ge=1)
    """Decisions drawn from the replay buffer for each optimizer step."""
    learning_starts: int = Field(default=0, ge=0)
    """Decisions collected before the first update from the replay buffer."""
    update_ratio: float = Field(default=1.0, gt=0)
    """Optimizer steps per decision collected, of updates from the replay buffer."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate at its peak."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    lr_warmup: int = Field(default=0, ge=0)
    """Iterations of linear warm-up of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    """Gradients are scaled down to this norm; inf: they are left as they are."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw of the run."""
    score_every: int = Field(default=0, ge=0)
    """Iterations between held-out scores; 0: before and after the run only."""
    score_prompts: int = Field(default=128, ge=1)
    """Held-out prompts or start states of a score."""
    score_rollouts: int = Field(default=1, ge=1)
    """Rollouts of each held-out prompt."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Iterations between checkpoints; one is always written at the end and on an interrupt."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that are kept."""
    patience: int = Field(default=5, ge=0)
    """Updates in a row that may be skipped because they were not finite."""
    sampler_cap: float = Field(default=2.0, gt=0)
    """Cap of the importance weight trainer / sampler, where a sampler's numerics differ from the trainer's."""
    skip_silent: bool = True
    """Do not evaluate trajectories that can add no gradient."""
    compile: bool = False
    """Compile loss and gradient into one graph, which pays for small networks on control; needs a C++ compiler, and seconds
    at the start. Results are the same up to rounding."""
    ranks: int | None = Field(default=None, ge=1)
    """Number of processes the run must have; refused if it has another."""
    sharding: Literal["none", "fsdp2"] = "none"
    """"none": every rank holds all parameters; "fsdp2": they are sharded."""

    def with_defaults(self, defaults: Mapping[str, Any], whole_trajectories: bool = False) -> Self:
        """The same settings, with a method's defaults for the fields that were left open.

        Args:
            defaults: values by field.
            whole_trajectories: the default number of minibatches is meant for single decisions, but the loss keeps trajectories
                whole: it is lowered to the rollouts of an iteration.

        Raises:
            ConfigError: a default is out of range or fits the other fields badly.
        """
        given = self.model_dump(exclude_unset=True)
        settings = self.create("trainer", **{**defaults, **given})
        rows = settings.prompts * settings.rollouts
        if whole_trajectories and "minibatches" not in given and settings.minibatches > rows:
            return self.create("trainer", **{**defaults, **given, "minibatches": rows})
        return settings
