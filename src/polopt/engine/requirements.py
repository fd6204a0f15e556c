"""What a method needs of a run, refused before anything runs."""

from collections.abc import Mapping
from typing import Any

from polopt.batch import EVALUATED
from polopt.engine.scores import SCORES
from polopt.errors import ConfigError
from polopt.method import Method


def check_requirements(method: Method, domain: str, provides: frozenset[str], own_rollouts: bool) -> None:
    """Refuse a method that does not fit an actor.

    Args:
        method: the method.
        domain: of the actor.
        provides: evaluation fields that the actor can compute, and optional batch fields that its rollouts carry. Score
            vectors are computed of any actor.
        own_rollouts: its rollouts are its own, with the log-probabilities of the policy that made them.

    Raises:
        ConfigError: a part is for other domains, needs a field that is not there, or needs the policy behind the rollouts.
    """
    available = provides | SCORES | {f"{p}_{name}" for p in ("old", "ref") for name in provides & EVALUATED}
    for part in method.parts:
        if part.domains is not None and domain not in part.domains:
            raise ConfigError(
                f"{part.slot} {part.name}: works on {', '.join(sorted(part.domains))}, not on {domain}"
            )
        for name in sorted(part.requires - method.provides - available):
            raise ConfigError(f"{part.slot} {part.name}: needs {name!r}, which this {domain} run lacks")
    if not own_rollouts and not method.surrogate.any_origin:
        raise ConfigError(
            f"language.stored = true: surrogate {method.surrogate.name} reads the policy that made the completions, which is "
            "unknown; use --surrogate copg"
        )


def check_off_policy(method: Method, sizes: Mapping[str, Any]) -> None:
    """Refuse a replay buffer where it makes no sense, and a method that needs one without it.

    Args:
        method: the method.
        sizes: the trainer's settings by name.

    Raises:
        ConfigError: the one without the other, a part that cannot work on decisions of earlier policies, or a setting that
            does not fit.
    """
    name, size = method.surrogate.name, sizes["buffer_size"]
    if method.off_policy and not size:
        raise ConfigError(
            f"trainer.buffer_size = 0: surrogate {name} needs replayed decisions; set it, to 1000000 for instance"
        )
    if not size:
        return
    if not (method.off_policy and method.surrogate.any_origin):
        raise ConfigError(
            f"trainer.buffer_size = {size}: surrogate {name} needs decisions of the present policy; set it to 0"
        )
    if not method.decision_wise:
        raise ConfigError(
            f"surrogate {name}: needs aggregation=token_mean with a replay buffer, which holds no trajectories"
        )
    optimizer = method.optimizer
    if optimizer.averages_rollouts or optimizer.per_group_gradients or optimizer.second_rollout:
        raise ConfigError(
            f"optimizer {optimizer.name}: needs whole rollouts, not a replay buffer; use --optimizer default"
        )
    for setting, needed in (("epochs", 1), ("minibatches", 1), ("replay", 1), ("sharding", "none")):
        if sizes[setting] != needed:
            raise ConfigError(
                f"trainer.{setting} = {sizes[setting]!r}: a replay buffer needs {needed!r}; update_ratio sets the number of "
                "steps, and target networks follow whole parameters"
            )
