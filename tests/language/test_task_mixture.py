"""A mixture draws from all its tasks, knows which task an example is of, and never trains on what any holds out."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import polopt
from polopt.errors import ConfigError
from polopt.language.actor import LanguageActor
from polopt.language.config import LanguageConfig
from polopt.language.task_mixture import Mixture
from polopt.language.task_spec import split_spec
from polopt.language.tasks import task_from_spec

PAIR = "builtin:largest+builtin:smallest"


def mixture(spec: str = PAIR, **options: Any) -> Mixture:
    task = task_from_spec(spec, **options)
    assert isinstance(task, Mixture)
    return task


def rows(path: Path, questions: list[str]) -> str:
    lines = [json.dumps({"prompt": question, "answer": str(len(question))}) for question in questions]
    path.write_text("\n".join(lines))
    return f"jsonl:{path}"


def test_a_plus_joins_tasks_and_nothing_else() -> None:
    assert split_spec("builtin:add") == ["builtin:add"]
    assert split_spec("jsonl:a+b.jsonl+python:c+d.py:rows") == ["jsonl:a+b.jsonl", "python:c+d.py:rows"]


def test_examples_say_which_task_they_are_of() -> None:
    task = mixture()
    for example in [*map(task.train, range(200)), *map(task.heldout, range(task.heldout_size))]:
        words = example.prompt.rpartition("Q: ")[2]
        assert words.startswith(("largest", "smallest")[example.task])
        numbers = list(map(int, re.findall(r"\d+", words)))
        assert example.answer == str((max, min)[example.task](numbers))


def test_any_stretch_has_the_tasks_in_proportion_to_their_sizes() -> None:
    task = mixture(**{"1.train_size": 300, "2.train_size": 100, "1.heldout_size": 10, "2.heldout_size": 30})
    assert (task.train_size, task.heldout_size) == (400, 40)
    assert Counter(task.train(i).task for i in range(400)) == {0: 300, 1: 100}
    for start in range(0, 400, 40):
        assert abs(sum(task.train(i).task for i in range(start, start + 40)) - 10) <= 1
    assert sum(task.heldout(i).task for i in range(8)) in (5, 6, 7)


def test_prompt_ids_are_of_the_mixture_and_examples_always_the_same() -> None:
    one, other = mixture(), mixture()
    for i in (0, 1, 77, one.train_size - 1):
        assert one.train(i) == other.train(i) and one.train(i).prompt_id == i
    assert one.heldout(3) == other.heldout(3) and one.heldout(3).prompt_id == one.train_size + 3
    for call, index in ((one.train, one.train_size), (one.heldout, one.heldout_size), (one.train, -1)):
        with pytest.raises(IndexError):
            call(index)


def test_what_one_task_holds_out_is_trained_on_by_none(tmp_path: Path) -> None:
    questions = [f"question {i}" for i in range(40)]
    specs = [rows(tmp_path / "a.jsonl", questions), rows(tmp_path / "b.jsonl", [*questions[20:], "else"])]
    task = mixture("+".join(specs), heldout_fraction=0.3, **{"2.seed": 5})
    trained = {task.train(i).prompt for i in range(task.train_size)}
    held = {task.heldout(i).prompt for i in range(task.heldout_size)}
    assert held and trained and not trained & held


def test_a_question_that_one_task_demonstrates_is_held_out_by_none(tmp_path: Path) -> None:
    questions = [f"question {i}" for i in range(20)]
    specs = [rows(tmp_path / "a.jsonl", questions), rows(tmp_path / "b.jsonl", questions)]
    task = mixture("+".join(specs), style="few_shot", shots=3, heldout_fraction=0.5, **{"2.seed": 5})
    asked = [task.heldout(i) for i in range(task.heldout_size)]
    assert asked
    for example in asked:
        for other in task.members:
            shown = {shot.prompt for shot in other.examples.shots}
            assert example.prompt.rpartition("Q: ")[2].removesuffix("\nA:") not in shown


def test_wholly_held_out_tasks_are_refused(tmp_path: Path) -> None:
    questions = [f"question {i}" for i in range(10)]
    one, other = rows(tmp_path / "a.jsonl", questions), rows(tmp_path / "b.jsonl", questions)
    with pytest.raises(ConfigError, match="no question is left"):
        mixture(f"{one}+{rows(tmp_path / 'c.jsonl', ['new'])}", **{"2.heldout": other[6:]})


def test_each_completion_is_scored_by_its_own_task() -> None:
    task = mixture()
    examples = [task.train(i) for i in range(20)]
    scores = task.score([f" {example.answer}\n" for example in examples], examples)
    assert scores.rewards.eq(1).all() and scores.rewards.shape == (20, 1) and scores.format_ok.all()
    wrong = [examples[i + 1 if i % 2 == 0 else i - 1].answer for i in range(20)]
    found = task.score(wrong, examples).rewards[:, 0]
    assert found.tolist() == [float(w == e.answer) for w, e in zip(wrong, examples, strict=True)]
    assert task.score([], []).rewards.shape == (0, 1)
    with pytest.raises(ValueError, match="completions"):
        task.score(["1"], [])


def test_further_rewards_are_shared_by_name_and_missing_where_a_task_has_none(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def brevity(completion):\n    return -len(completion)\n")
    reward = f"python:{tmp_path}/r.py:brevity"
    with mixture(**{"2.rewards": [reward], "in_process": True}) as task:
        assert task.reward_names[1:] == task.members[1].reward_names[1:]
        scores = task.score([" 1"] * 6, [task.train(i) for i in range(6)])
        of = torch.tensor([task.train(i).task for i in range(6)])
        assert scores.rewards[:, 1].isnan().tolist() == (of == 0).tolist()
    with mixture(rewards=[reward], in_process=True) as task:
        assert len(task.reward_names) == 2
        assert not task.score([" 1"] * 6, [task.train(i) for i in range(6)]).rewards.isnan().any()


def test_options_are_of_all_tasks_or_of_one() -> None:
    task = mixture(count=3, **{"2.digits": 1})
    assert [member.info["options"]["count"] for member in task.members] == [3, 3]
    assert [member.info["options"]["digits"] for member in task.members] == [2, 1]
    json.dumps(task.info)


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("builtin:largest+builtin:largest", {}, "named twice"),
        ("builtin:largest+builtin:larges", {}, "did you mean 'largest'"),
        (PAIR, {"3.count": 2}, "number from 1 to 2"),
        (PAIR, {"2": 2}, "NUMBER.OPTION"),
        (PAIR, {"2.cuont": 2}, "did you mean 'count'"),
        (PAIR, {"2.style": "chat"}, "give one style"),
        (PAIR, {"cuont": 2}, "builtin:largest.cuont"),
    ],
)
def test_bad_mixtures_are_refused_in_one_line(spec: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_from_spec(spec, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_g2rpo_ranks_inside_the_tasks_of_a_mixture_and_scores_are_told_apart() -> None:
    task = mixture(shots=1)
    config = LanguageConfig(model="tiny:1x16", max_new_tokens=3)
    actor = LanguageActor.build(config, stop=task.stop)
    settings = polopt.TrainerConfig(prompts=6, rollouts=3, iterations=1, score_prompts=6)
    trainer = polopt.Trainer(actor, task, polopt.recipe("g2rpo", sampler="default"), settings)
    batches: list[polopt.Batch] = []
    rollout = actor.rollout
    actor.rollout = lambda *given: batches.append((found := rollout(*given)).batch) or found  # type: ignore[method-assign]
    summary = trainer.run()
    assert set(batches[1].task.tolist()) == {0, 1}
    assert {"score/builtin:largest", "score/builtin:smallest"} <= summary["after"].keys()
