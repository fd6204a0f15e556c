"""From a configuration to a trainer, with everything refused that cannot work before a model is loaded.

trainer = build(RunConfig.create("", method="rloo", language={"model": "tiny:2x32"}))
summary = trainer.run()
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polopt.cli.catalog import check_parts
from polopt.cli.domains import DOMAINS
from polopt.config import DOMAIN_DEFAULTS, RunConfig, configure
from polopt.engine.tracking import require_tracker
from polopt.errors import ConfigError

if TYPE_CHECKING:
    from polopt.engine.record import Reporter
    from polopt.method import Method
    from polopt.trainer import Trainer

RUNS = Path("runs")


def check_quickly(config: RunConfig) -> None:
    """Refuse what can be refused without importing torch: names, libraries, files.

    Raises:
        ConfigError: naming the field.
        MissingExtraError: naming the library and how to install it.
    """
    for plugin in config.plugins:
        if plugin.suffix != ".py" or not os.path.isfile(plugin):
            raise ConfigError(f"plugins = '{plugin}': there is no such Python file")
    check_parts(config)
    for tracker in config.trackers:
        require_tracker(tracker)
    DOMAINS[config.domain].require(config)


def check_folder(out: Path | None) -> None:
    """Refuse a run folder that cannot become one.

    Raises:
        ConfigError: it holds a run already, or is a file.
    """
    if out is None:
        return
    if os.path.exists(out / "config.json"):
        raise ConfigError(
            f"out = '{out}': holds a run already; continue it by `polopt resume {out}`, or choose another"
        )
    if os.path.exists(out) and not os.path.isdir(out):
        raise ConfigError(f"out = '{out}': is a file; choose another folder")


def resolve(config: RunConfig) -> "tuple[RunConfig, Method]":
    """The method, and the configuration with the method's own defaults where it left the choice open.

    Raises:
        ConfigError: a part or an option is unknown or out of range, or the parts do not fit together or the domain.
    """
    from polopt.engine.requirements import check_requirements
    from polopt.registry import recipe

    for plugin in config.plugins:
        _import_plugin(plugin)
    method = recipe(config.method, config.domain, **config.slots)
    of_domain = DOMAIN_DEFAULTS.get(config.domain, {}).get("trainer", {})
    whole_trajectories = config.domain == "control" and not method.decision_wise
    trainer = config.trainer.with_defaults({**of_domain, **method.defaults}, whole_trajectories)
    config = configure({**dict(config), "trainer": trainer})
    own_rollouts = config.domain != "language" or not config.language.stored
    check_requirements(method, config.domain, DOMAINS[config.domain].provides(), own_rollouts)
    return config, method


class Prepared(NamedTuple):
    """A configuration that can work: everything but the model is there."""

    config: RunConfig
    """Resolved."""
    method: "Method"
    task: Any


def prepare(config: RunConfig) -> Prepared:
    """Check a configuration in the order of what that costs; close the task after use.

    Raises:
        ConfigError: it cannot work.
        MissingExtraError: a library is not installed.
    """
    check_quickly(config)
    task = DOMAINS[config.domain].task(config)
    try:
        return Prepared(*resolve(config), task)
    except BaseException:
        task.close()
        raise


def build(config: RunConfig, reporters: "Sequence[Reporter]" = (), out: Path | None = None) -> "Trainer":
    """The trainer of a configuration; `close` it after use.

    Args:
        config: the configuration.
        reporters: get the metrics of the run.
        out: run folder; None keeps nothing on disk.

    Raises:
        ConfigError: the configuration cannot work.
        MissingExtraError: a library is not installed.
    """
    return assemble(prepare(config), reporters, out)


def assemble(prepared: Prepared, reporters: "Sequence[Reporter]" = (), out: Path | None = None) -> "Trainer":
    """The trainer of a prepared configuration, whose model is loaded here.

    Raises:
        ConfigError: there is no such model, or not the number of processes that was asked for.
    """
    from polopt.engine.ranks import Ranks
    from polopt.trainer import Trainer

    config, method, task = prepared
    try:
        ranks = Ranks.start(config.trainer.sharding, config.trainer.ranks)
        actor = DOMAINS[config.domain].actor(config, task, method)
        description = config.model_dump(mode="json")
        return Trainer(
            actor, task, method, config.trainer, out=out, description=description, reporters=reporters, ranks=ranks
        )  # fmt: skip
    except BaseException:
        task.close()
        raise


def close(trainer: "Trainer") -> None:
    """Release what a trainer holds: the task's processes and the group of ranks."""
    trainer.task.close()
    trainer.ranks.close()


def claim_folder(config: RunConfig) -> Path:
    """Make the run folder; without `out` the first of runs/METHOD-TASK-001, 002, ... that is free.

    Raises:
        ConfigError: the folder cannot be made.
    """
    names = (
        [config.out] if config.out else (RUNS / f"{_short_name(config)}-{i:03d}" for i in range(1, 100_000))
    )
    for out in names:
        try:
            out.mkdir(parents=True, exist_ok=config.out is not None)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"out = '{out}': cannot be made, {error.strerror}") from None
        return out
    raise ConfigError(f"out: no free name under {RUNS}; name a folder by --out")


def release_folder(out: Path) -> None:
    """Remove a claimed folder in which nothing has been written."""
    with suppress(OSError):
        out.rmdir()


def is_main_process() -> bool:
    """Whether this process speaks for the run: rank 0 of what `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _short_name(config: RunConfig) -> str:
    kind, _, rest = config.task.partition(":")
    name = rest or kind
    task = name.rpartition(":")[2] if kind == "python" else Path(name).stem
    return re.sub(r"[^\w.-]+", "-", f"{config.method}-{task}")


def _import_plugin(path: Path) -> None:
    from polopt.language.worker_process import describe, load_file

    try:
        load_file(str(path))
    except Exception as error:
        raise ConfigError(f"plugins = '{path}': cannot be imported, {describe(error)}") from error
