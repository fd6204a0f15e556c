"""Tasks give the same examples to everyone, never train on what they hold out, and refuse bad specs at once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.errors import ConfigError, MissingExtraError
from polopt.language import graders
from polopt.language.builtin_tasks import BUILTINS
from polopt.language.examples import Example, GeneratedExamples, ListedExamples, indices_needed
from polopt.language.task import SYSTEM_PROMPT
from polopt.language.tasks import LanguageTask, list_tasks, task_from_spec

SOLVE: dict[str, Callable[[list[int]], str]] = {
    "largest": lambda n: str(max(n)),
    "smallest": lambda n: str(min(n)),
    "sort": lambda n: " ".join(map(str, sorted(n))),
    "reverse": lambda n: " ".join(map(str, n[::-1])),
    "add": lambda n: str(sum(n)),
}


def numbers_of(question: str) -> list[int]:
    return [int(word) for word in question.replace("=", " ").split() if word.isdigit()]


def last_question(task: LanguageTask, prompt: Any) -> str:
    return prompt.rpartition("Q: ")[2].removesuffix("\nA:") if task.style == "few_shot" else prompt


@pytest.mark.parametrize("name", BUILTINS)
@pytest.mark.parametrize(("count", "digits"), [(2, 1), (3, 2), (5, 3)])
def test_builtin_answers_are_right_and_rewarded(name: str, count: int, digits: int) -> None:
    task = task_from_spec(f"builtin:{name}", count=count, digits=digits)
    examples = [task.train(i) for i in range(50)]
    for example in examples:
        numbers = numbers_of(last_question(task, example.prompt))
        assert len(numbers) == count
        assert all(len(str(number)) == digits for number in numbers)
        assert example.answer == SOLVE[name](numbers)
    scores = task.score([f" {example.answer}\nQ: largest of 1" for example in examples], examples)
    assert scores.rewards.eq(1).all()
    assert scores.format_ok.all()
    assert (
        task.score([f" {example.answer} {example.answer}" for example in examples], examples)
        .rewards.eq(0)
        .all()
    )


@pytest.mark.parametrize("name", BUILTINS)
def test_builtin_heldout_numbers_are_never_trained_on(name: str) -> None:
    task = task_from_spec(f"builtin:{name}", digits=1, count=2, heldout_size=20, train_size=3000, shots=4)
    key = BUILTINS[name].key
    heldout = {key(task.heldout(i)) for i in range(task.heldout_size)}
    train = {key(task.train(i)) for i in range(task.train_size)}
    shots = {key(shot) for shot in task.examples.shots}
    assert len(heldout) == 20
    assert len(shots) == 4
    assert not (heldout & train or heldout & shots or train & shots)
    assert len(heldout) + len(train) + len(shots) == BUILTINS[name].different(2, 1), "and nothing is left out"


def test_few_shot_prompts_are_demonstrations_then_the_question() -> None:
    task = task_from_spec("builtin:largest", shots=2)
    lines = str(task.train(0).prompt).split("\n")
    assert [line[:3] for line in lines] == ["Q: ", "A: ", "Q: ", "A: ", "Q: ", "A:"]
    assert lines[1] == f"A: {max(numbers_of(lines[0]))}"
    assert task.stop == ("\n",)
    assert task.system_prompt == ""


def test_chat_and_plain_prompts() -> None:
    chat = task_from_spec("builtin:largest", style="chat")
    plain = task_from_spec("builtin:largest", style="plain")
    question = plain.train(0).prompt
    assert chat.train(0).prompt == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]
    assert chat.stop == plain.stop == ()
    answer = chat.train(0).answer
    assert chat.score([f"It is <answer>{answer}</answer>", answer], [chat.train(0)] * 2).rewards[
        :, 0
    ].tolist() == [1, 0]
    assert task_from_spec("builtin:largest", style="chat", system_prompt="").train(0).prompt == [
        {"role": "user", "content": question}
    ]


PRINT = """
import json, sys
from polopt.language.tasks import task_from_spec
for spec in sys.argv[1:]:
    task = task_from_spec(spec)
    held = task.heldout(1)
    print(json.dumps([task.train(i).prompt for i in (3, 0, 7, 3)] + [held.prompt, held.prompt_id]))
"""


def test_examples_are_the_same_in_every_interpreter_and_order() -> None:
    pytest.importorskip("reasoning_gym")
    specs = ["builtin:sort", "reasoning_gym:chain_sum"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", PRINT, *specs]
    there = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120).stdout
    for spec, line in zip(specs, there.splitlines(), strict=True):
        task = task_from_spec(spec)
        held, prompt_id = task.heldout(1).prompt, task.train_size + 1
        assert json.loads(line) == [task.train(i).prompt for i in (3, 0, 7, 3)] + [held, prompt_id]
        assert task_from_spec(spec, seed=1).heldout(1).prompt != held


def numbered(index: int, values: int) -> Example:
    return Example(index, f"question {hash((index, 17)) % values}", "answer")


@settings(max_examples=60)
@given(
    values=st.integers(1, 60), heldout=st.integers(1, 30), shots=st.integers(0, 5), train=st.integers(1, 200)
)
def test_generated_splits_are_disjoint_or_refused(values: int, heldout: int, shots: int, train: int) -> None:
    try:
        examples = GeneratedExamples(
            "g",
            lambda index: numbered(index, values),
            lambda example: str(example.prompt),
            train_size=train,
            heldout_size=heldout,
            shots=shots,
        )
        trained = {str(examples.train(i).prompt) for i in range(train)}
    except ConfigError:
        assert values <= heldout + shots
        return
    held = {str(examples.heldout(i).prompt) for i in range(heldout)}
    shown = {str(shot.prompt) for shot in examples.shots}
    assert (len(held), len(shown)) == (heldout, shots)
    assert not (held & trained or shown & trained or held & shown)
    ids = [examples.train(i).prompt_id for i in range(train)] + [
        examples.heldout(i).prompt_id for i in range(heldout)
    ]
    assert ids == list(range(train + heldout))


def test_generated_indices_stay_inside_the_generator() -> None:
    seen = []

    def generate(index: int) -> Example:
        seen.append(index)
        return numbered(index, 500)

    examples = GeneratedExamples(
        "g", generate, lambda e: str(e.prompt), train_size=100, heldout_size=20, shots=2
    )
    for i in range(100):
        examples.train(i)
    assert max(seen) < indices_needed(100, 20, 2)
    for outside in (-1, 100):
        with pytest.raises(IndexError):
            examples.train(outside)


@settings(max_examples=60)
@given(
    prompts=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40),
    other=st.none() | st.lists(st.sampled_from("abcxyz"), min_size=1, max_size=5),
    fraction=st.floats(0.05, 0.95),
    shots=st.integers(0, 2),
    seed=st.integers(0, 3),
)
def test_listed_splits_never_share_a_prompt(
    prompts: list[str], other: list[str] | None, fraction: float, shots: int, seed: int
) -> None:
    rows = [Example(i, prompt, str(i)) for i, prompt in enumerate(prompts)]
    heldout = None if other is None else [Example(i, prompt, str(i)) for i, prompt in enumerate(other)]
    try:
        examples = ListedExamples("l", rows, heldout, heldout_fraction=fraction, shots=shots, seed=seed)
    except ConfigError:
        assert len(set(prompts) - set(other or [])) < 3 + shots or fraction > 0.5
        return
    train = [examples.train(i) for i in range(examples.train_size)]
    held = [examples.heldout(i) for i in range(examples.heldout_size)]
    shown, trained, tested = ({str(e.prompt) for e in part} for part in (examples.shots, train, held))
    assert len(shown) == shots
    assert not (trained & tested or shown & trained or shown & tested)
    assert [e.prompt_id for e in train + held] == list(range(len(train) + len(held)))
    kept = {row.answer for row in rows if row.prompt not in shown | tested}
    assert {e.answer for e in train} == kept, "repeated training rows are all kept"
    if other is None:
        assert len(held) == max(1, round(fraction * len(set(prompts))))
        assert examples.removed == 0
    else:
        assert examples.removed == sum(prompt in other for prompt in prompts)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


SUMS = [{"prompt": f"{i} + 1 =", "answer": i + 1, "level": i % 3} for i in range(40)]


def test_jsonl_rows_become_examples_with_metadata(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "sums.jsonl", SUMS)
    task = task_from_spec(f"jsonl:{path}", heldout_fraction="0.25")
    assert (task.train_size, task.heldout_size) == (30, 10)
    assert task.style == "plain"
    assert task.reward_names == ("numeric",)
    example = task.train(5)
    assert example.metadata == {"level": (int(example.answer) - 1) % 3}
    scores = task.score([f"that is {example.answer}.0", "that is 1000"], [example] * 2)
    assert scores.rewards[:, 0].tolist() == [1.0, 0.0]
    shown = task_from_spec(f"jsonl:{path}", style="few_shot", shots=3)
    assert str(shown.train(0).prompt).count("Q: ") == 4
    assert shown.train_size == 40 - 4 - 3


def test_a_heldout_file_is_never_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", SUMS)
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [*SUMS[:7], {"prompt": "9 + 9 =", "answer": "18"}])
    task = task_from_spec(f"jsonl:{path}", heldout=heldout)
    assert (task.train_size, task.heldout_size) == (33, 8)
    assert task.info["removed_from_train"] == 7
    with pytest.raises(ConfigError, match="heldout_fraction"):
        task_from_spec(f"jsonl:{path}", heldout=heldout, heldout_fraction=0.5)


def test_chat_rows_keep_their_messages(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}]
    rows = [{"q": [{"role": "user", "content": f"{i} + 1"}], "a": str(i + 1)} for i in range(9)] + [
        {"q": own, "a": "2"}
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    task = task_from_spec(f"jsonl:{path}", prompt_column="q", answer_column="a", verifier="exact")
    prompts = [task.train(i).prompt for i in range(task.train_size)] + [task.heldout(0).prompt]
    assert task.style == "chat"
    assert own in prompts
    assert all(isinstance(p, list) and p[0]["role"] == "system" and p[-1]["role"] == "user" for p in prompts)
    with pytest.raises(ConfigError, match="chat messages"):
        task_from_spec(f"jsonl:{path}", prompt_column="q", answer_column="a", style="plain")


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([row | {"answer": str(row["answer"])} for row in SUMS])
    rows.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(train=rows.select(range(30)), test=rows.select(range(25, 40)))
    splits.save_to_disk(tmp_path / "two")
    one = task_from_spec(f"dataset:{tmp_path / 'one'}")
    assert one.train_size + one.heldout_size == 40
    two = task_from_spec(f"dataset:{tmp_path / 'two'}", heldout_split="test")
    assert (two.train_size, two.heldout_size) == (25, 15)
    assert two.train(0).metadata == {"level": 0}
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        task_from_spec(f"dataset:{tmp_path / 'two'}", heldout_split="tset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a saved data set"):
        task_from_spec(f"dataset:{tmp_path / 'empty'}")


def test_python_functions_give_rows_and_rewards(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def rows(size: int, seed, prefix='n'):\n"
        "    for i in range(size):\n"
        "        yield {'prompt': f'{prefix}{i} {seed}', 'answer': str(i), 'metadata': {'bonus': 5}}\n"
        "def reward(completion, answer, bonus):\n"
        "    return bonus + (completion == answer)\n"
    )
    with task_from_spec(f"python:{path}:rows", size="20", seed=3, workers=1) as task:
        assert task.train_size == 18
        assert task.reward_names == ("reward",)
        example = task.train(0)
        assert str(example.prompt).startswith("n")
        assert str(example.prompt).endswith(" 3")
        assert task.score([example.answer, "no"], [example] * 2).rewards[:, 0].tolist() == [6.0, 5.0]
    named = task_from_spec(
        f"python:{path}:rows", size=20, verifier=f"numeric,python:{path}:reward", in_process=True
    )
    assert named.reward_names == ("numeric", "reward")
    with pytest.raises(ConfigError, match="did you mean 'prefix'"):
        task_from_spec(f"python:{path}:rows", size=20, prefx="m")
    with pytest.raises(ConfigError, match=r"size: required"):
        task_from_spec(f"python:{path}:rows")


def test_every_task_takes_further_rewards(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def brevity(completion): return -len(completion)")
    rewards = ["format", f"python:{path}:brevity"]
    with task_from_spec("builtin:largest", rewards=rewards, workers=1) as task:
        example = task.train(0)
        scores = task.score([example.answer, ""], [example] * 2)
    assert task.reward_names == scores.names == ("exact", "format", "brevity")
    assert scores.rewards.tolist() == [[1, 1, -2], [0, 0, 0]]
    with pytest.raises(ConfigError, match="cannot load function 'brevty'"):
        task_from_spec("builtin:largest", rewards=[f"python:{path}:brevty"])


def test_rows_without_answers_need_a_verifier_of_ones_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "open.jsonl", [{"prompt": f"p{i}"} for i in range(20)])
    task = task_from_spec(f"jsonl:{path}", verifier="format")
    assert task.train(0).answer == ""
    with pytest.raises(ConfigError, match="answer_column"):
        task_from_spec(f"jsonl:{path}")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (
            '{"question": "a", "answer": "1"}',
            {},
            "prompt_column = 'prompt': row 0 lacks it; allowed: question, answer",
        ),
        (
            '{"prompt": "a", "anser": "1"}',
            {},
            "answer_column = 'answer': row 0 lacks it; did you mean 'anser'",
        ),
        ('{"prompt": "a", "answer": "Paris"}\n{"prompt": "b", "answer": "1"}', {}, "'Paris' is no number"),
        ('{"prompt": 3, "answer": "1"}', {}, "neither text nor a list"),
        ('{"prompt": ["a"], "answer": "1"}', {}, "neither text nor a list"),
        ('{"prompt": "a", "answer": ["1"]}', {}, "neither text nor a number"),
        ('{"prompt": "a", "answer": "1"}', {}, "1 different prompts"),
        ('{"prompt": "a"', {}, "line 1 is not JSON"),
        ("\n[1]", {}, "line 2 is not a JSON object"),
        ("[" * 100_000, {}, "line 1 is not JSON"),
        ("\udcff", {}, "line 1 is not JSON"),
        ("", {}, "no rows"),
        ('{"prompt": "a", "answer": "1"}', {"prompt_colum": "a"}, "did you mean 'prompt_column'"),
        ('{"prompt": "a", "answer": "1"}', {"heldout_fraction": 1.5}, "heldout_fraction = 1.5"),
        ('{"prompt": "a", "answer": "1"}', {"verifier": "numerc"}, "did you mean 'numeric'"),
        (
            '{"prompt": "a", "answer": "1"}',
            {"heldout": "nowhere.jsonl"},
            "nowhere.jsonl: there is no such file",
        ),
        ('{"prompt": "a", "answer": "1"}', {"style": "chatty"}, "style = 'chatty'"),
    ],
)
def test_bad_rows_and_options_are_refused_in_one_line(
    tmp_path: Path, content: str, options: dict[str, Any], words: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        task_from_spec(f"jsonl:{path}", **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "spec", "words"),
    [
        ("def rows(): return [1]", "rows", "gives a int among its rows"),
        ("def rows(): return 1", "rows", "TypeError"),
        ("def rows(): yield 1 / 0", "rows", "ZeroDivisionError"),
        ("def rows(): return []", "rows", "no rows"),
        ("def row(): return []", "rows", "no function 'rows'; defined are: row"),
        ("import nothing_like_it", "rows", "ModuleNotFoundError"),
        ("def rows(): return []", "1", "write python:FILE.py:FUNCTION"),
    ],
)
def test_bad_python_files_are_refused_in_one_line(
    tmp_path: Path, content: str, spec: str, words: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        task_from_spec(f"python:{path}:{spec}")
    assert words in str(error.value)
    assert "mine.py" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("largest", {}, "did you mean 'builtin:largest'"),
        ("bultin:largest", {}, "did you mean 'builtin:largest'"),
        ("builtin:larges", {}, "did you mean 'largest'"),
        ("builtin:", {}, "unknown"),
        ("builtin:largest", {"cuont": 4}, "did you mean 'count'"),
        ("builtin:largest", {"count": "four"}, "count = 'four'"),
        ("builtin:largest", {"count": 0}, "count = 0"),
        ("builtin:largest", {"count": 11, "digits": 1}, "count = 11: there are only 10 numbers"),
        ("builtin:largest", {"shots": 0}, "shots = 0"),
        ("builtin:largest", {"shots": 2, "style": "chat"}, "only 'few_shot'"),
        ("builtin:largest", {"extract": "lst_number"}, "did you mean 'last_number'"),
        ("builtin:add", {"heldout_size": 60}, "heldout_size"),
        ("jsonl:nowhere.jsonl", {}, "no such file"),
        ("dataset:nowhere", {}, "no such directory"),
        ("python:nowhere.py:rows", {}, "nowhere.py"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, options: dict[str, Any], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        task_from_spec(spec, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("reasoning_gym")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("chain_sums", {}, "did you mean 'chain_sum'"),
        ("chain_sum", {"min_term": 2}, "did you mean 'min_terms'"),
        ("chain_sum", {"min_terms": -2}, "min_terms must be positive"),
        ("chain_sum", {"min_terms": "many"}, "min_terms = 'many'"),
        (
            "chain_sum",
            {"min_digits": 1, "max_digits": 1, "max_terms": 2, "heldout_size": 2000},
            "lower heldout_size",
        ),
        ("composite", {}, "composite"),
        ("list_functions", {}, "another question at every reading"),
        ("graph_color", {}, "no reference answers to demonstrate"),
    ],
)
def test_bad_generators_are_refused_in_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_from_spec(f"reasoning_gym:{name}", **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("reasoning_gym")
def test_generators_that_follow_the_hash_seed_want_it_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
        task_from_spec("reasoning_gym:word_ladder")


@pytest.mark.usefixtures("reasoning_gym")
def test_reasoning_gym_splits_are_disjoint_in_a_small_generator() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = task_from_spec("reasoning_gym:chain_sum", **options, heldout_size=60, train_size=2000)
    held = {task.heldout(i).metadata["question"] for i in range(60)}
    train = {task.train(i).metadata["question"] for i in range(2000)}
    shots = {shot.metadata["question"] for shot in task.examples.shots}
    assert len(held) == 60
    assert not (held & train or shots & train or held & shots)
    assert len(held | train | shots) == 200


@pytest.mark.usefixtures("reasoning_gym")
def test_reasoning_gym_scores_the_final_answer_alone() -> None:
    with task_from_spec("reasoning_gym:chain_sum", workers=1, timeout=30) as task:
        example = task.heldout(0)
        right = example.answer
        completions = [f" {right}\nQ: more", f"junk {right}", f"{right} {right}", f"{right}0", "", right]
        scores = task.score(completions, [example] * 6)
    assert scores.rewards[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert scores.names == ("score",)
    assert not scores.faults.total


@pytest.mark.usefixtures("reasoning_gym")
def test_reasoning_gym_scorers_take_several_right_answers_and_no_nonsense() -> None:
    with task_from_spec("reasoning_gym:countdown", style="chat", workers=1, timeout=30) as task:
        example = task.heldout(0)
        other = f"({example.answer}) + 0"
        reordered = f"({example.answer})"
        finals = [example.answer, reordered, other, "exec(chr(49))", "1"]
        scores = task.score([f"<answer>{final}</answer>" for final in finals], [example] * 5)
        assert scores.rewards[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    with task_from_spec("reasoning_gym:game_of_life_halting", style="chat", workers=1, timeout=30) as task:
        example = task.heldout(0)
        scores = task.score(
            [f"<answer>{text}</answer>" for text in (example.answer, "nonsense")], [example] * 2
        )
        assert scores.rewards[:, 0].tolist() == [1.0, 0.0]


@pytest.mark.usefixtures("reasoning_gym")
def test_answers_of_several_lines_end_at_the_next_question() -> None:
    task = task_from_spec("reasoning_gym:binary_matrix", shots=1)
    assert task.stop == ("\nQ:",)
    example = task.train(0)
    assert task.score([f" {example.answer}\nQ: next"], [example]).rewards.item() == 1.0
    task.close()


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graders, "find_spec", lambda name: None)
    path = write_jsonl(tmp_path / "sums.jsonl", SUMS)
    for spec, options in (
        ("reasoning_gym:chain_sum", {}),
        (f"dataset:{tmp_path}", {}),
        (f"jsonl:{path}", {"verifier": "math"}),
    ):
        with pytest.raises(MissingExtraError, match=r'pip install "polopt\[language\]"'):
            task_from_spec(spec, **options)


def test_tasks_are_listed_with_their_parameters_as_json() -> None:
    entries = json.loads(json.dumps(list_tasks()))
    by_spec = {entry["spec"]: entry for entry in entries}
    assert {f"builtin:{name}" for name in BUILTINS} <= by_spec.keys()
    assert {"jsonl:FILE", "dataset:DIR", "python:FILE:FUNCTION"} <= by_spec.keys()
    for entry in entries:
        assert entry.keys() == {"spec", "kind", "summary", "available", "parameters"}
        assert entry["summary"]
        names = [parameter["name"] for parameter in entry["parameters"]]
        assert len(set(names)) == len(names)
        assert {"seed", "style", "shots"} <= set(names)
    defaults = {p["name"]: p["default"] for p in by_spec["builtin:sort"]["parameters"]}
    assert (defaults["count"], defaults["digits"]) == (3, 2)


@pytest.mark.usefixtures("reasoning_gym")
def test_every_generator_is_listed_with_its_own_parameters() -> None:
    by_spec = {entry["spec"]: entry for entry in list_tasks()}
    assert sum(spec.startswith("reasoning_gym:") for spec in by_spec) > 90
    names = {parameter["name"] for parameter in by_spec["reasoning_gym:chain_sum"]["parameters"]}
    assert {"min_terms", "partial_credit", "heldout_size"} <= names
    assert "size" not in names


def test_listing_matches_what_is_accepted() -> None:
    for entry in list_tasks():
        if entry["kind"] == "builtin":
            options = {parameter["name"]: parameter["default"] for parameter in entry["parameters"]}
            assert task_from_spec(entry["spec"], **options).train(0) == task_from_spec(entry["spec"]).train(0)


def test_info_is_json() -> None:
    info = json.loads(json.dumps(task_from_spec("builtin:add").info))
    assert info["options"]["count"] == 2
    assert info["heldout_size"] == 13
