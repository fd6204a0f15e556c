"""What a method needs of a run, refused before anything runs."""

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
