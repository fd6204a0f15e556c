"""Several tasks as one: every example says which of them it belongs to."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from polopt.errors import ConfigError
from polopt.language.examples import Example, question_text
from polopt.language.reward_workers import RewardFaults
from polopt.language.task import LanguageTask
from polopt.language.verifiers import Scores

_MAX_REDRAWS = 1000


class Mixture(LanguageTask):
    """Tasks whose prompts are drawn together, each in proportion to its number of prompts.

    Any stretch of the examples, training or held out, has the tasks in that proportion. The first reward is each task's
    own first one; further ones are shared by name, NaN where a task does not have them. A held-out question of one task
    is a training question or a demonstration of none.

    Args:
        name: the spec.
        tasks: at least two, in the same style; the mixture owns them.

    Raises:
        ConfigError: a task is named twice, or two have to be prompted or stopped differently.
    """

    def __init__(self, name: str, tasks: Sequence[LanguageTask]) -> None:
        self.name, self.members = name, tuple(tasks)
        first = tasks[0]
        for index, task in enumerate(tasks):
            if any(task.name == other.name for other in tasks[:index]):
                raise ConfigError(f"task = {name!r}: {task.name} is named twice")
            if (task.style, task.stop) != (first.style, first.stop):
                raise ConfigError(
                    f"task = {name!r}: {first.name} is prompted in the style {first.style!r} and stopped by "
                    f"{list(first.stop)}, {task.name} in {task.style!r} and by {list(task.stop)}; give one style"
                )
        self.style, self.system_prompt, self.stop = first.style, first.system_prompt, first.stop
        own = {task.reward_names[0] for task in tasks}
        further = [name for task in tasks for name in task.reward_names[1:]]
        self.reward_names = (own.pop() if len(own) == 1 else "task", *dict.fromkeys(further))
        self.train_size = sum(task.train_size for task in tasks)
        self._train = _mixed([torch.arange(task.train_size) for task in tasks])
        self._heldout_questions = [
            {question_text(task.examples.heldout(i)) for i in range(task.heldout_size)} for task in tasks
        ]
        self._heldout = _mixed([self._held_out(index) for index in range(len(tasks))])
        self.heldout_size = len(self._heldout)
        self.train(0)
        self.info = {
            "task": name, "style": self.style, "stop": list(self.stop), "rewards": list(self.reward_names),
            "train_size": self.train_size, "heldout_size": self.heldout_size, "tasks": [task.info for task in tasks],
        }  # fmt: skip

    def train(self, prompt_id: int) -> Example:
        """Training example `prompt_id`, always the same.

        Raises:
            IndexError: not in [0, train_size).
            ConfigError: (almost) all questions of a task are held out by another.
        """
        if not 0 <= prompt_id < self.train_size:
            raise IndexError(f"{self.name}: no training prompt {prompt_id} of {self.train_size}")
        index, start = self._train[prompt_id].tolist()
        task = self.members[index]
        others = [held for other, held in enumerate(self._heldout_questions) if other != index]
        for redraw in range(min(_MAX_REDRAWS, task.train_size)):
            at = (start + redraw) % task.train_size
            question = question_text(task.examples.train(at))
            if not any(question in held for held in others):
                return replace(task.train(at), prompt_id=prompt_id, task=index)
        raise ConfigError(f"{task.name}: no question is left to train on that another task does not hold out")

    def heldout(self, index: int) -> Example:
        """Held-out example `index`, always the same.

        Raises:
            IndexError: not in [0, heldout_size).
        """
        if not 0 <= index < self.heldout_size:
            raise IndexError(f"{self.name}: no held-out prompt {index} of {self.heldout_size}")
        task, at = self._heldout[index].tolist()
        return replace(self.members[task].heldout(at), prompt_id=self.train_size + index, task=task)

    def score(self, completions: Sequence[str], examples: Sequence[Example]) -> Scores:
        """Score N completions, each by the task of the example beside it.

        Raises:
            ValueError: the numbers differ.
        """
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions of {len(examples)} examples")
        rewards = torch.full((len(examples), len(self.reward_names)), torch.nan, dtype=torch.float64)
        format_ok = torch.zeros(len(examples), dtype=torch.bool)
        answers: list[str | None] = [None] * len(examples)
        faults = RewardFaults()
        for index, task in enumerate(self.members):
            rows = [row for row, example in enumerate(examples) if example.task == index]
            if not rows:
                continue
            found = task.score([completions[row] for row in rows], [examples[row] for row in rows])
            columns = [0, *(self.reward_names.index(name, 1) for name in found.names[1:])]
            rewards[torch.tensor(rows)[:, None], torch.tensor(columns)] = found.rewards
            format_ok[rows] = found.format_ok
            for row, answer in zip(rows, found.answers, strict=True):
                answers[row] = answer
            faults += found.faults
        return Scores(rewards, self.reward_names, format_ok, tuple(answers), faults)

    def close(self) -> None:
        """End the tasks' worker processes."""
        for task in self.members:
            task.close()

    def _held_out(self, index: int) -> Int[Tensor, " n"]:
        """Held-out examples of a task that no other task demonstrates."""
        task = self.members[index]
        others = [other for other in self.members if other is not task]
        shown = {question_text(shot) for other in others for shot in other.examples.shots}
        questions = [question_text(task.examples.heldout(i)) for i in range(task.heldout_size)]
        kept = [i for i, question in enumerate(questions) if question not in shown]
        if not kept:
            raise ConfigError(f"{task.name}: every held-out question is a demonstration of another task")
        return torch.tensor(kept)


def make_mixture(
    spec: str, specs: Sequence[str], options: dict[str, Any], make: Callable[..., LanguageTask]
) -> Mixture:
    """The mixture of some specs.

    Args:
        spec: the mixture's own.
        specs: the tasks'.
        options: of every task, or of one as "NUMBER.OPTION", counted from 1.
        make: the task of a spec and its options.

    Raises:
        ConfigError: an option of a task that is not there, or what one of the tasks refuses.
    """
    shared = {key: value for key, value in options.items() if not key.partition(".")[0].isdigit()}
    own: list[dict[str, Any]] = [{} for _ in specs]
    for key, value in options.items():
        number, dot, option = key.partition(".")
        if not number.isdigit():
            continue
        if not dot or not 1 <= int(number) <= len(specs):
            raise ConfigError(
                f"task_options.{key} = {value!r}: write NUMBER.OPTION with a task's number from 1 to {len(specs)}"
            )
        own[int(number) - 1][option] = value
    tasks: list[LanguageTask] = []
    try:
        for one, chosen in zip(specs, own, strict=True):
            tasks.append(make(one, **shared | chosen))
        return Mixture(spec, tasks)
    except BaseException:
        for task in tasks:
            task.close()
        raise


def _mixed(indices: Sequence[Int[Tensor, " n"]]) -> Int[Tensor, "total 2"]:
    """Pairs of a task and one of its indices, so that the tasks are spread evenly."""
    task = torch.cat([torch.full((len(found),), number) for number, found in enumerate(indices)])
    place = torch.cat(
        [(torch.arange(len(found), dtype=torch.float64) + 0.5) / len(found) for found in indices]
    )
    order = torch.argsort(place, stable=True)
    return torch.stack([task, torch.cat(list(indices))], 1)[order]
