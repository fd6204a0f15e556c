"""What a method needs of a run, refused before anything runs."""

from typing import cast

from polopt.batch import EVALUATED
from polopt.domain import Actor, ReplayActor
from polopt.engine.gradient import DIFFERENTIABLE
from polopt.engine.minibatches import cuts_decisions
from polopt.engine.ranks import Ranks
from polopt.engine.scores import SCORES, check_scores
from polopt.errors import ConfigError
from polopt.method import Method
from polopt.trainer_config import TrainerConfig


def check_run(method: Method, actor: Actor, config: TrainerConfig, ranks: Ranks) -> None:
    """Refuse a run that cannot work.

    Args:
        method: what to descend.
        actor: the policy in its domain.
        config: the sizes of the run, with the method's defaults.
        ranks: the processes of the run.

    Raises:
        ConfigError: the method needs what the actor or the configuration cannot give.
    """
    check_requirements(method, actor.domain, actor.provides, actor.own_rollouts)
    check_off_policy(method, config)
    if method.off_policy:
        check_learning_starts(config, cast(ReplayActor, actor).horizon)
    check_optimizer(method, config)
    if config.compile:
        check_compiled(method, actor.independent_decisions, ranks.world)
    rows = config.prompts * config.rollouts
    for name in sorted(method.requires & SCORES):
        check_scores(name, rows, 1, actor.module, ranks)
    if config.minibatches > rows and not cuts_decisions(actor, method):
        raise ConfigError(
            f"trainer.minibatches = {config.minibatches}: more than the rollouts of an iteration"
        )


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


def check_off_policy(method: Method, config: TrainerConfig) -> None:
    """Refuse a replay buffer where it makes no sense, and a method that needs one without it.

    Args:
        method: the method.
        config: the sizes of the run, with the method's defaults.

    Raises:
        ConfigError: the one without the other, a part that cannot work on decisions of earlier policies, or a setting that
            does not fit.
    """
    name, size = method.surrogate.name, config.buffer_size
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
        if (given := getattr(config, setting)) != needed:
            raise ConfigError(
                f"trainer.{setting} = {given!r}: a replay buffer needs {needed!r}; update_ratio sets the number of "
                "steps, and target networks follow whole parameters"
            )


def check_learning_starts(config: TrainerConfig, horizon: int) -> None:
    """Refuse a run that ends before its first update.

    Args:
        config: the sizes of the run, with the method's defaults.
        horizon: decisions of a rollout.

    Raises:
        ConfigError: it collects fewer decisions than `learning_starts`.
    """
    of_iteration = config.prompts * config.rollouts * horizon
    total, starts = config.iterations * of_iteration, config.learning_starts
    if 0 < total < starts:
        raise ConfigError(
            f"trainer.learning_starts = {starts}: the run collects {total} decisions only and would never learn; set it to "
            f"at most {total}, or trainer.iterations to at least {-(-starts // of_iteration)}"
        )


def check_optimizer(method: Method, config: TrainerConfig) -> None:
    """Refuse an optimizer that needs another loss or another division of the data.

    Args:
        method: the method.
        config: the sizes of the run, with the method's defaults.

    Raises:
        ConfigError: naming what the optimizer needs.
    """
    optimizer, c = method.optimizer, config
    if optimizer.per_group_gradients and not method.separable:
        raise ConfigError(f"optimizer {optimizer.name}: needs a loss that is a sum over trajectories")
    if optimizer.averages_rollouts and c.epochs * c.minibatches * c.replay > 1:
        raise ConfigError(
            f"optimizer {optimizer.name}: needs trainer.epochs, minibatches and replay of 1, one step per rollout"
        )
    others = method.evaluated.intersection(DIFFERENTIABLE) - {"logp", "entropy"}
    if optimizer.second_rollout and (others or not method.separable or c.sharding != "none"):
        raise ConfigError(
            f"optimizer {optimizer.name}: needs whole parameters, and a loss that is a sum over trajectories of "
            "functions of logp and entropy"
        )


def check_compiled(method: Method, independent_decisions: bool, world: int) -> None:
    """Refuse to compile what is not one graph.

    Args:
        method: the method.
        independent_decisions: the actor sees each decision alone.
        world: number of processes.

    Raises:
        ConfigError: one of them does not fit.
    """
    if not independent_decisions:
        raise ConfigError("trainer.compile = true: works on control alone; set it to false")
    if world > 1:
        raise ConfigError(f"trainer.compile = true: works in one process, not in {world}; set it to false")
    if not method.separable:
        raise ConfigError(
            f"trainer.compile = true: method {method.name} needs a loss that is a sum over trajectories; set it to false"
        )
