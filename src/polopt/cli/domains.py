"""What the command line must know of each domain. A domain is an entry of `DOMAINS` and a section of `RunConfig`."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from polopt.cli.control_domain import ControlDomain
from polopt.config import RunConfig
from polopt.errors import ConfigError, MissingExtraError
from polopt.language.task_spec import split_spec
from polopt.settings import nearest

if TYPE_CHECKING:
    from polopt.cli.estimate import Estimate
    from polopt.domain import Task
    from polopt.language.actor import LanguageActor
    from polopt.language.tasks import LanguageTask
    from polopt.method import Method
    from polopt.miniature import SumModActor, SumModTask

CRITIC = frozenset({"value", "old_value"})
KINDS = {
    "reasoning_gym": "reasoning_gym:NAME",
    "jsonl": "jsonl:FILE",
    "dataset": "dataset:DIR",
    "python": "python:FILE:FUNCTION",
}
"""Kinds of language tasks, besides the built-in ones, with the form of their specs."""
ENVIRONMENT = re.compile(r"-v\d+$")  # the end of a Gymnasium id
TINY = re.compile(r"tiny:\d+x\d+(:(byte|char))?")
_WARM_UP_ROWS = 64
"""Examples of a supervised step."""


class Domain(Protocol):
    """A domain, from a configuration."""

    units: tuple[str, ...]
    """What budgets of comparisons may count, the usual one first: rollouts, or decisions by the name they have here."""

    def require(self, config: RunConfig) -> None:
        """Refuse what needs libraries or files that are not there; quick, without torch.

        Raises:
            ConfigError: a file is missing.
            MissingExtraError: a library is missing.
        """
        ...

    def provides(self) -> frozenset[str]:
        """What the domain's actor provides if asked, before there is one."""
        ...

    def task(self, config: RunConfig) -> "Task":
        """The task."""
        ...

    def actor(self, config: RunConfig, task: Any, method: "Method") -> Any:
        """The `polopt.domain.Actor`; loads whatever is large."""
        ...

    def estimate(self, config: RunConfig, task: Any, method: "Method") -> "Estimate":
        """Memory and time of an iteration, without loading weights."""
        ...

    def iteration_size(self, config: RunConfig, method: "Method", unit: str) -> int | None:
        """Units that an iteration makes; None if that is not known beforehand."""
        ...

    def threshold(self, task: str) -> float:
        """Score at which a task counts as solved; infinity if nobody says."""
        ...

    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that there are: `spec`, `kind`, `summary`, `available`, `parameters`."""
        ...


class _Rollouts:
    """A domain whose iterations have `prompts * rollouts` rollouts, scored by a share of successes."""

    units: tuple[str, ...] = ("rollouts", "tokens")

    def iteration_size(self, config: RunConfig, method: "Method", unit: str) -> int | None:
        """Rollouts of an iteration; nobody knows its tokens."""
        return config.trainer.prompts * config.trainer.rollouts if unit == "rollouts" else None

    def threshold(self, task: str) -> float:
        """Four successes in five."""
        return 0.8


class LanguageDomain(_Rollouts):
    """Causal language models on tasks with verifiable answers."""

    def require(self, config: RunConfig) -> None:
        """Libraries of model and task, and the files that the task and the rewards are in."""
        needed = {"transformers": "domain = 'language'"}
        if config.language.lora_rank:
            needed["peft"] = f"language.lora_rank = {config.language.lora_rank}"
        tasks = split_spec(config.task)
        if any(task.startswith("reasoning_gym:") for task in tasks):
            needed["reasoning_gym"] = f"task = {config.task!r}"
        for task in tasks:
            self._require_kind(task)
        self._require_model(config.language.model)
        for module, purpose in needed.items():
            if find_spec(module) is None:
                raise MissingExtraError(
                    f'{purpose}: needs {module}, which is not installed: pip install "polopt[language]"'
                )
        given = [*(("task", task) for task in tasks), *(("reward", reward) for reward in config.reward)]
        for field, spec in given:
            kind, _, rest = spec.partition(":")
            if kind != "python" and field == "reward":
                raise ConfigError(f"reward = {spec!r}: write python:FILE:FUNCTION")
            file = {"python": rest.rpartition(":")[0], "jsonl": rest, "dataset": rest}.get(kind)
            if file is not None and not os.path.exists(file):
                raise ConfigError(f"{field} = {spec!r}: there is no file {file!r}")

    def provides(self) -> frozenset[str]:
        """Everything that can be evaluated, and what rollouts carry."""
        from polopt.batch import EVALUATED, OFF_POLICY

        return EVALUATED - OFF_POLICY - {"kl", "median"} | {
            "old_entropy",
            "terminated",
            "truncated",
            "answer",
            "task",
        }

    def task(self, config: RunConfig) -> "LanguageTask":
        """The task, with the run's further rewards."""
        from polopt.language.tasks import task_from_spec

        rewards = {"rewards": config.reward} if config.reward else {}
        return task_from_spec(config.task, **config.task_options, **rewards)

    def actor(self, config: RunConfig, task: "LanguageTask", method: "Method") -> "LanguageActor":
        """The model, warmed up if it is one from scratch."""
        from polopt.language.actor import LanguageActor

        critic, seed = bool(CRITIC & method.requires), config.trainer.seed
        actor = LanguageActor.build(config.language, stop=task.stop, critic=critic, seed=seed)
        if config.language.warm_up:
            self._warm_up(actor, config, task)
        return actor

    def estimate(self, config: RunConfig, task: "LanguageTask", method: "Method") -> "Estimate":
        """See `polopt.cli.estimate`."""
        from polopt.cli.estimate import estimate_language

        return estimate_language(config, task, method)

    def tasks(self) -> list[dict[str, Any]]:
        """See `polopt.language.tasks.list_tasks`."""
        from polopt.language.tasks import list_tasks

        return list_tasks()

    def _require_kind(self, spec: str) -> None:
        from polopt.language.builtin_tasks import BUILTINS

        builtins = [f"builtin:{name}" for name in BUILTINS]
        kind, _, rest = spec.partition(":")
        if spec not in builtins and (kind not in KINDS or not rest):
            if ENVIRONMENT.search(spec):
                raise ConfigError(f"task = {spec!r}: looks like an environment, which needs --domain control")
            raise ConfigError(f"task = {spec!r}: unknown; {nearest(spec, [*builtins, *KINDS.values()])}")

    def _require_model(self, spec: str) -> None:
        missing = spec.startswith(("/", "~", ".")) and not os.path.isdir(os.path.expanduser(spec))
        if missing or (spec.startswith("tiny:") and not TINY.fullmatch(spec)):
            raise ConfigError(
                f"language.model = {spec!r}: there is none; allowed: a directory, a hub id, 'smollm2', "
                "'tiny:LAYERSxWIDTH', 'tiny:LAYERSxWIDTH:char'"
            )

    def _warm_up(self, actor: "LanguageActor", config: RunConfig, task: "LanguageTask") -> None:
        from polopt.engine.seeding import generator
        from polopt.language.tiny import warm_up

        steps, draws = config.language.warm_up, generator(config.trainer.seed, "warm_up", 0)
        pairs = islice(_answered(task), steps * _WARM_UP_ROWS)
        warm_up(actor.model, actor.tokenizer, pairs, steps, _WARM_UP_ROWS, config.language.warm_up_lr, draws)
        actor.language_model.keep_reference()


def _answered(task: "LanguageTask") -> Iterator[tuple[Any, str]]:
    """Training prompts with the completion that answers them in the task's style."""
    for index in range(task.train_size):
        example = task.train(index)
        if example.answer:
            tagged = f"<answer>{example.answer}</answer>" if task.style == "chat" else example.answer
            yield example.prompt, f" {tagged}{task.stop[0]}" if task.stop else tagged


class MiniatureDomain(_Rollouts):
    """Small networks from scratch on sums with the right remainder: runs of seconds."""

    def require(self, config: RunConfig) -> None:
        """The task and its options."""
        from polopt.miniature_config import STANDARD_TASKS, standard_options

        specs = [f"miniature:{name}" for name in STANDARD_TASKS]
        if config.task not in specs:
            raise ConfigError(f"task = {config.task!r}: unknown; {nearest(config.task, specs)}")
        if config.reward:
            raise ConfigError(f"reward = {config.reward[0]!r}: a miniature task has its own rewards alone")
        standard_options(config.task.partition(":")[2], **config.task_options)

    def provides(self) -> frozenset[str]:
        """Everything that the small network can be asked for."""
        from polopt.miniature import PROVIDES

        return PROVIDES

    def task(self, config: RunConfig) -> "SumModTask":
        """The standard task, with the run's options."""
        from polopt.miniature import SumModTask
        from polopt.miniature_config import standard_options

        options = standard_options(config.task.partition(":")[2], **config.task_options)
        return SumModTask(**options.model_dump())

    def actor(self, config: RunConfig, task: "SumModTask", method: "Method") -> "SumModActor":
        """The network, whose initial weights are drawn by the run's seed."""
        from polopt.miniature import SumModActor

        c = config.miniature
        return SumModActor(task, c.width, seed=config.trainer.seed, sampled_scores=c.sampled_scores)

    def estimate(self, config: RunConfig, task: "SumModTask", method: "Method") -> "Estimate":
        """See `polopt.cli.estimate`."""
        from polopt.cli.estimate import estimate_by_trial

        return estimate_by_trial(config, task, self.actor(config, task, method))

    def tasks(self) -> list[dict[str, Any]]:
        """The standard tasks."""
        from polopt.miniature_config import STANDARD_TASKS, standard_options

        found = []
        for name, (summary, _) in STANDARD_TASKS.items():
            options, fields = standard_options(name), type(standard_options(name)).model_fields
            parameters = [
                {"name": option, "type": field.annotation.__name__, "default": getattr(options, option)}
                | {"description": field.description}
                for option, field in fields.items()
                if isinstance(field.annotation, type)
            ]
            entry = {"spec": f"miniature:{name}", "kind": "miniature", "summary": summary}
            found.append({**entry, "available": True, "parameters": parameters})
        return found


DOMAINS: dict[str, Domain] = {
    "miniature": MiniatureDomain(),
    "language": LanguageDomain(),
    "control": ControlDomain(),
}
