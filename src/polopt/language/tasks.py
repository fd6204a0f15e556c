"""Language tasks by spec.

    task = task_from_spec("builtin:largest", count=5)
    example = task.train(7)
    task.score([" 93"], [example]).rewards

A task draws nothing from a run's random state: the same spec and options (the task's own `seed` among them) give the
same examples, whatever the seed of the run, so that runs are scored on the same held-out questions.
"""

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import chain, islice
from typing import Any

from polopt.errors import ConfigError
from polopt.language.builtin_tasks import BUILTINS
from polopt.language.examples import Example, GeneratedExamples, ListedExamples, indices_needed
from polopt.language.graders import Exact, Grader, ReasoningGym, require
from polopt.language.rows import Rows, call_rows, load_rows_function, read_dataset, read_jsonl, to_examples
from polopt.language.task import LanguageTask, Style, stop_strings
from polopt.language.task_mixture import make_mixture
from polopt.language.task_options import (
    BuiltinOptions,
    DatasetOptions,
    JsonlOptions,
    PythonOptions,
    ReasoningGymOptions,
    RowOptions,
    TaskOptions,
    builtin_fields,
    dataclass_fields,
    describe_fields,
    function_fields,
    plain,
    with_fields,
)
from polopt.language.task_spec import split_spec
from polopt.language.verifiers import Verifier, make_graders, python_source
from polopt.language.worker_process import accepted, describe
from polopt.settings import nearest

__all__ = ["Example", "LanguageTask", "list_tasks", "task_from_spec"]

_CHECKED_ANSWERS = 1000
_HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Generators of reasoning-gym 0.1 whose questions or answers follow the iteration order of sets."""


def task_from_spec(spec: str, /, **options: Any) -> LanguageTask:
    """The task that a spec names.

    Args:
        spec: `builtin:NAME`, `reasoning_gym:NAME`, `jsonl:FILE`, `dataset:DIR` or `python:FILE:FUNCTION`; several of
            them joined by "+" are a mixture.
        **options: see `list_tasks`; texts are converted to the types there. In a mixture an option counts for every
            task, or as "2.count" for the second.

    Raises:
        ConfigError: unknown kind, name or option, a value out of range, data that is missing or of the wrong form.
        MissingExtraError: a library is needed that is not installed.

    Example:
        >>> task = task_from_spec("builtin:reverse", shots=1, heldout_size=16)
        >>> print(task.heldout(0).prompt)  # doctest: +ELLIPSIS
        Q: reverse ...
        A: ...
        Q: reverse ...
        A:
    """
    if len(specs := split_spec(spec)) > 1:
        return make_mixture(spec, specs, options, task_from_spec)
    kind, _, name = spec.partition(":")
    if kind not in _KINDS or not name:
        known = [f"builtin:{builtin}" for builtin in BUILTINS]
        forms = ["reasoning_gym:NAME", "jsonl:FILE", "dataset:DIR", "python:FILE:FUNCTION"]
        raise ConfigError(f"task = {spec!r}: unknown; {nearest(spec, known + forms)}")
    return _KINDS[kind](spec, name, options)


def list_tasks() -> list[dict[str, Any]]:
    """All tasks and kinds of tasks, those of reasoning-gym by name if it is installed.

    Returns:
        JSON objects: `spec`, `kind`, `summary`, `available` and `parameters` (name, type, default, description).
    """
    entries = [
        _entry(f"builtin:{name}", builtin.summary, with_fields(BuiltinOptions, builtin_fields(builtin)))
        for name, builtin in BUILTINS.items()
    ]
    entries += [
        _entry("jsonl:FILE", "rows of a JSON-lines file", JsonlOptions),
        _entry(
            "dataset:DIR",
            "rows of a saved `datasets` directory",
            DatasetOptions,
            find_spec("datasets") is not None,
        ),
        _entry("python:FILE:FUNCTION", "rows that your function returns or yields", PythonOptions),
    ]
    if find_spec("reasoning_gym") is None:
        return [
            *entries,
            _entry("reasoning_gym:NAME", "generated puzzles", ReasoningGymOptions, available=False),
        ]
    from reasoning_gym.factory import DATASETS

    for name, (dataset, config) in sorted(DATASETS.items()):
        options = with_fields(ReasoningGymOptions, dataclass_fields(config))
        summary = (dataset.__doc__ or name.replace("_", " ")).strip().partition("\n")[0]
        entries.append(_entry(f"reasoning_gym:{name}", summary, options))
    return entries


def _entry(spec: str, summary: str, options: type[TaskOptions], available: bool = True) -> dict[str, Any]:
    return {
        "spec": spec,
        "kind": spec.partition(":")[0],
        "summary": summary,
        "available": available,
        "parameters": describe_fields(options),
    }


def _builtin(spec: str, name: str, options: dict[str, Any]) -> LanguageTask:
    if name not in BUILTINS:
        raise ConfigError(f"task = {spec!r}: unknown; {nearest(name, list(BUILTINS))}")
    builtin = BUILTINS[name]
    chosen: Any = with_fields(BuiltinOptions, builtin_fields(builtin)).create(spec, **options)
    different = builtin.different(chosen.count, chosen.digits)
    examples = GeneratedExamples(
        spec,
        builtin.generator(chosen.count, chosen.digits, chosen.seed),
        builtin.key,
        train_size=chosen.train_size,
        heldout_size=chosen.heldout_size or max(1, min(128, different // 4)),
        shots=_shots(chosen, chosen.style),
    )
    verifier = _verifier([Exact()], chosen, chosen.style, examples.shots)
    return _task(spec, examples, verifier, chosen, chosen.style)


def _reasoning_gym(spec: str, name: str, options: dict[str, Any]) -> LanguageTask:
    require("reasoning_gym", spec)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = get_close_matches(name, DATASETS, 1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"task = {spec!r}: unknown; {hint}`polopt tasks` lists all")
    if name in _HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise ConfigError(
            f"{spec}: follows Python's hash seed; start with PYTHONHASHSEED=0, so that it can be resumed"
        )
    own = dataclass_fields(DATASETS[name][1])
    chosen = with_fields(ReasoningGymOptions, own).create(spec, **options)
    shots = _shots(chosen, chosen.style)
    size = indices_needed(chosen.train_size, chosen.heldout_size, shots)
    arguments = {field: getattr(chosen, field) for field in own if field in chosen.model_fields_set}
    arguments |= {"seed": chosen.seed, "size": size}
    try:
        dataset = reasoning_gym.create_dataset(name, **arguments)
        repeated = dataset[0]["question"] == dataset[0]["question"]
    except Exception as error:  # the library checks its options with assertions
        raise ConfigError(f"{spec}: {describe(error)}") from None
    if not repeated:
        raise ConfigError(
            f"{spec}: gives another question at every reading of the same index; it cannot be resumed"
        )

    def generate(index: int) -> Example:
        entry = dataset[index]
        answer = entry["answer"]
        return Example(index, entry["question"], "" if answer is None else str(answer), entry)

    examples = GeneratedExamples(
        spec,
        generate,
        lambda example: example.metadata["question"],
        train_size=chosen.train_size,
        heldout_size=chosen.heldout_size,
        shots=shots,
    )
    if any(not shot.answer for shot in examples.shots):
        raise ConfigError(
            f"{spec}.style = 'few_shot': there are no reference answers to demonstrate; use 'chat'"
        )
    grader = ReasoningGym(name, arguments, chosen.partial_credit, chosen.timeout, chosen.workers)
    verifier = _verifier([grader], chosen, chosen.style, examples.shots)
    return _task(spec, examples, verifier, chosen, chosen.style)


def _jsonl(spec: str, name: str, options: dict[str, Any]) -> LanguageTask:
    chosen = JsonlOptions.create(spec, **options)
    heldout = read_jsonl(chosen.heldout) if chosen.heldout else None
    return _from_rows(spec, read_jsonl(name), heldout, chosen)


def _dataset(spec: str, name: str, options: dict[str, Any]) -> LanguageTask:
    chosen = DatasetOptions.create(spec, **options)
    heldout = read_dataset(name, chosen.heldout_split) if chosen.heldout_split else None
    return _from_rows(spec, read_dataset(name, chosen.split), heldout, chosen)


def _python(spec: str, name: str, options: dict[str, Any]) -> LanguageTask:
    source = python_source(name)
    module, function = load_rows_function(source)
    chosen = with_fields(PythonOptions, function_fields(function)).create(spec, **options)
    if "verifier" not in chosen.model_fields_set and callable(getattr(module, "reward", None)):
        chosen = chosen.model_copy(update={"verifier": f"python:{source.module}:reward"})
    return _from_rows(spec, call_rows(source, function, accepted(function, dict(chosen))), None, chosen)


def _from_rows(spec: str, rows: Rows, heldout: Rows | None, chosen: RowOptions) -> LanguageTask:
    names = [name.strip() for name in chosen.verifier.split(",")]
    graders = make_graders(names, abs_tol=chosen.abs_tol, rel_tol=chosen.rel_tol, **_supervision(chosen))
    columns = (chosen.prompt_column, chosen.answer_column, any(grader.needs_answer for grader in graders))
    train = to_examples(rows, spec, *columns)
    chat = not isinstance(train[0].prompt, str)
    style = chosen.style or ("chat" if chat else "plain")
    if chat and style != "chat":
        raise ConfigError(f"{spec}.style = {style!r}: the prompts are chat messages; use 'chat'")
    examples = ListedExamples(
        spec,
        train,
        None if heldout is None else to_examples(heldout, f"{spec} (held out)", *columns),
        heldout_fraction=chosen.heldout_fraction,
        shots=_shots(chosen, style),
        seed=chosen.seed,
    )
    verifier = _verifier(graders, chosen, style, examples.shots)
    for example in islice(
        chain(map(examples.heldout, range(examples.heldout_size)), train), _CHECKED_ANSWERS
    ):
        verifier.check(example.answer)
    return _task(spec, examples, verifier, chosen, style, removed_from_train=examples.removed)


def _shots(options: TaskOptions, style: Style) -> int:
    if style != "few_shot" and "shots" in options.model_fields_set:
        raise ConfigError(
            f"shots = {options.shots}: has no effect in the style {style!r}; only 'few_shot' has any"
        )
    return options.shots if style == "few_shot" else 0


def _verifier(
    graders: Sequence[Grader], options: TaskOptions, style: Style, shots: Sequence[Example]
) -> Verifier:
    further = make_graders(options.rewards, **_supervision(options))
    return Verifier([*graders, *further], _extract(options, style, shots), options.timeout)


def _supervision(options: TaskOptions) -> dict[str, Any]:
    return {"timeout": options.timeout, "workers": options.workers, "in_process": options.in_process}


def _extract(options: TaskOptions, style: Style, shots: Sequence[Example]) -> str:
    """Where the final answer is, unless the user has said so."""
    if options.extract is not None:
        return options.extract
    if style == "few_shot":
        return "first_line" if stop_strings(style, shots) == ("\n",) else "whole"
    if style == "chat":
        return "tag:answer"
    return {"numeric": "last_number", "math": "boxed"}.get(
        getattr(options, "verifier", "").partition(",")[0], "whole"
    )


def _task(
    spec: str,
    examples: GeneratedExamples | ListedExamples,
    verifier: Verifier,
    options: TaskOptions,
    style: Style,
    **info: Any,
) -> LanguageTask:
    given = {name: plain(value) for name, value in options}
    return LanguageTask(
        spec,
        examples,
        verifier,
        style=style,
        system_prompt=options.system_prompt,
        info={"options": given, **info},
    )


_KINDS: dict[str, Callable[[str, str, dict[str, Any]], LanguageTask]] = {
    "builtin": _builtin,
    "reasoning_gym": _reasoning_gym,
    "jsonl": _jsonl,
    "dataset": _dataset,
    "python": _python,
}
