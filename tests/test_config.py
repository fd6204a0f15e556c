"""Configurations: what is refused and how, and that files, flags and Python say the same."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polopt.cli import main
from polopt.cli.building import build, prepare
from polopt.cli.catalog import Catalog
from polopt.config import SECTIONS, RunConfig, configure, read_toml, to_toml
from polopt.errors import ConfigError, MissingExtraError

Bad = tuple[dict[str, Any], list[str], list[str]]

BAD: dict[str, Bad] = {
    # what is wrong: (the configuration, the same as flags, what the message names)
    "key misspelt": ({"metod": "grpo"}, ["--metod", "grpo"], ["metod", "method"]),
    "key of another table": ({"lr": 1e-5}, [], ["lr", "[trainer]"]),
    "key of the run in a table": ({"trainer": {"method": "ppo"}}, [], ["method", "before the first table"]),
    "trainer key misspelt": ({"trainer": {"itertions": 3}}, ["--itertions", "3"], ["itertions", "iterations"]),
    "trainer key abbreviated": ({"trainer": {"iter": 3}}, ["--iter", "3"], ["iter", "iterations"]),
    "language key misspelt": ({"language": {"temprature": 1}}, ["--temprature", "1"], ["temprature", "temperature"]),
    "language key in trainer": ({"trainer": {"top_p": 0.5}}, [], ["top_p", "[language]"]),
    "table misspelt": ({"trainers": {"lr": 1.0}}, [], ["trainers", "trainer"]),
    "table is a number": ({"trainer": 3}, [], ["trainer", "3"]),
    "plural flag": ({"regularizer": "kl"}, ["--regularizers", "kl"], ["regularizer"]),
    "domain unknown": ({"domain": "contrl"}, ["--domain", "contrl"], ["domain", "contrl", "language"]),
    "domain of another type": ({"domain": 3}, [], ["domain", "3"]),
    "method misspelt": ({"method": "gprpo"}, ["--method", "gprpo"], ["method", "gprpo", "grpo"]),
    "method empty": ({"method": ""}, ["--method", ""], ["method"]),
    "method is a list": ({"method": ["grpo"]}, [], ["method"]),
    "surrogate misspelt": ({"surrogate": "gsppo"}, ["--surrogate", "gsppo"], ["surrogate", "gsppo", "gspo"]),
    "surrogate of no kind": ({"surrogate": "default"}, ["--surrogate", "default"], ["surrogate", "default"]),
    "advantage misspelt": ({"advantage": ["bnop"]}, ["--advantage", "bnop"], ["advantage", "bnop", "bnpo"]),
    "part of another slot": ({"advantage": "etr"}, ["--advantage", "etr"], ["advantage", "etr"]),
    "regularizer misspelt": ({"regularizers": "kll"}, ["--regularizer", "kll"], ["regularizers", "kll", "kl"]),
    "sampler misspelt": ({"sampler": "dapoo"}, ["--sampler", "dapoo"], ["sampler", "dapoo", "dapo"]),
    "budget misspelt": ({"budget": "knapsac"}, ["--budget", "knapsac"], ["budget", "knapsac", "knapsack"]),
    "selection misspelt": ({"selection": "d4s"}, ["--selection", "d4s"], ["selection", "d4s", "d3s"]),
    "shaping misspelt": ({"shaping": "overlng"}, ["--shaping", "overlng"], ["shaping", "overlng", "overlong"]),
    "optimizer misspelt": ({"optimizer": "defalt"}, ["--optimizer", "defalt"], ["optimizer", "defalt", "default"]),
    "option misspelt": (
        {"surrogate": "ppo:clip_hihg=0.3"}, ["--surrogate", "ppo:clip_hihg=0.3"], ["ppo.clip_hihg", "clip_high"],
    ),
    "option out of range": ({"surrogate": "ppo:clip_low=7"}, ["--surrogate", "ppo:clip_low=7"], ["ppo.clip_low", "7"]),
    "option of another type": (
        {"surrogate": "ppo:clip_low=abc"}, ["--surrogate", "ppo:clip_low=abc"], ["ppo.clip_low", "abc"],
    ),
    "option without value": ({"surrogate": "ppo:clip_low"}, ["--surrogate", "ppo:clip_low"], ["clip_low", "key=value"]),
    "option not among the choices": (
        {"regularizers": "kl:estimator=k7"}, ["--regularizer", "kl:estimator=k7"], ["kl.estimator", "k7", "k3"],
    ),
    "option called like an argument": (
        {"surrogate": "ppo:where=3"}, ["--surrogate", "ppo:where=3"], ["ppo.where", "unknown"],
    ),
    "option negative": ({"regularizers": "kl:coef=-1"}, ["--regularizer", "kl:coef=-1"], ["kl.coef", "-1"]),
    "option not finite": ({"regularizers": "kl:coef=nan"}, ["--regularizer", "kl:coef=nan"], ["kl.coef", "nan"]),
    "inherited option out of range": (
        {"surrogate": "gspo:constant=0"}, ["--surrogate", "gspo:constant=0"], ["gspo.constant", "0"],
    ),
    "options that contradict": (
        {"surrogate": "ppo:dual_clip=1.1"}, ["--surrogate", "ppo:dual_clip=1.1"], ["ppo", "dual_clip", "clip_high"],
    ),
    "transform without estimator": ({"advantage": "adora"}, ["--advantage", "adora"], ["adora", "estimator"]),
    "no estimator": ({"advantage": []}, [], ["advantage", "estimator"]),
    "two estimators": (
        {"advantage": ["grpo", "rloo"]}, ["--advantage", "grpo", "--advantage", "rloo"], ["advantage rloo", "one"],
    ),
    "signal that nobody provides": ({"regularizers": "value"}, ["--regularizer", "value"], ["value", "returns"]),
    "iterations negative": ({"trainer": {"iterations": -1}}, ["--iterations", "-1"], ["iterations", "-1"]),
    "iterations a fraction": ({"trainer": {"iterations": 1.5}}, ["--steps", "1.5"], ["iterations", "1.5"]),
    "iterations a word": ({"trainer": {"iterations": "many"}}, ["--iterations", "many"], ["iterations", "many"]),
    "iterations a boolean": ({"trainer": {"iterations": True}}, ["--iterations", "true"], ["iterations", "true"]),
    "iterations a list": ({"trainer": {"iterations": [3]}}, [], ["iterations"]),
    "lr zero": ({"trainer": {"lr": 0}}, ["--lr", "0"], ["lr", "0"]),
    "lr negative": ({"trainer": {"lr": -1e-5}}, ["--lr", "-1e-5"], ["lr", "-1e-05"]),
    "lr not finite": ({"trainer": {"lr": float("inf")}}, ["--lr", "inf"], ["lr", "inf"]),
    "lr a boolean": ({"trainer": {"lr": True}}, ["--lr", "yes"], ["lr"]),
    "prompts zero": ({"trainer": {"prompts": 0}}, ["--prompts", "0"], ["prompts", "0"]),
    "rollouts zero": ({"trainer": {"rollouts": 0}}, ["--rollouts=0"], ["rollouts", "0"]),
    "epochs zero": ({"trainer": {"epochs": 0}}, ["--epochs", "0"], ["epochs", "0"]),
    "seed negative": ({"trainer": {"seed": -3}}, ["--seed", "-3"], ["seed", "-3"]),
    "gradient norm negative": ({"trainer": {"max_grad_norm": -1}}, ["--max-grad-norm", "-1"], ["norm", "-1"]),
    "gradient norm not a number": (
        {"trainer": {"max_grad_norm": float("nan")}}, ["--max-grad-norm", "nan"], ["norm", "nan"],
    ),
    "a boolean among the layers": (
        {"domain": "control", "control": {"hidden": [True, 64]}}, [], ["control.hidden", "no boolean"],
    ),
    "keep zero": ({"trainer": {"keep": 0}}, ["--keep", "0"], ["keep", "0"]),
    "schedule unknown": (
        {"trainer": {"lr_schedule": "cosin"}}, ["--lr-schedule", "cosin"], ["schedule", "cosin", "cosine"],
    ),
    "sharding unknown": ({"trainer": {"sharding": "fsdp"}}, ["--sharding", "fsdp"], ["sharding", "fsdp", "fsdp2"]),
    "ranks zero": ({"trainer": {"ranks": 0}}, ["--ranks", "0"], ["ranks", "0"]),
    "boolean a word": ({"trainer": {"skip_silent": "perhaps"}}, ["--skip-silent", "perhaps"], ["silent", "perhaps"]),
    "more minibatches than rollouts": (
        {"trainer": {"minibatches": 999}}, ["--minibatches", "999"], ["minibatches", "999", "rollouts"],
    ),
    "the method's minibatches, fewer rollouts": (
        {"method": "ppo", "trainer": {"prompts": 1, "rollouts": 2}},
        ["--method", "ppo", "--prompts", "1", "--rollouts", "2"],
        ["minibatches = 4", "rollouts"],
    ),
    "greedy scores repeated": (
        {"trainer": {"score_rollouts": 4}}, ["--score-rollouts", "4"], ["rollouts", "score_temperature"],
    ),
    "temperature zero": ({"language": {"temperature": 0}}, ["--temperature", "0"], ["temperature", "0"]),
    "top_p above one": ({"language": {"top_p": 1.7}}, ["--top-p", "1.7"], ["top", "1.7"]),
    "top_k negative": ({"language": {"top_k": -1}}, ["--top-k", "-1"], ["top", "-1"]),
    "no tokens": ({"language": {"max_new_tokens": 0}}, ["--max-new-tokens", "0"], ["new", "0"]),
    "dtype unknown": ({"language": {"dtype": "float16"}}, ["--dtype", "float16"], ["dtype", "float16", "bfloat16"]),
    "warm-up of a trained model": ({"language": {"warm_up": 3}}, ["--warm-up", "3"], ["warm", "tiny:"]),
    "warm-up of adapters": (
        {"language": {"warm_up": 3, "lora_rank": 8, "model": "tiny:2x32"}},
        ["--warm-up", "3", "--lora-rank", "8", "--model", "tiny:2x32"],
        ["warm", "3", "lora_rank"],
    ),
    "model is a number": ({"language": {"model": 3}}, [], ["language.model", "3"]),
    "task kind misspelt": ({"task": "buitin:add"}, ["--task", "buitin:add"], ["task", "buitin:add", "builtin:add"]),
    "task name misspelt": ({"task": "builtin:largst"}, ["--task", "builtin:largst"], ["task", "builtin:largest"]),
    "task without kind": ({"task": "largest"}, ["--task", "largest"], ["task", "largest", "builtin:"]),
    "task file missing": ({"task": "jsonl:no.jsonl"}, ["--task", "jsonl:no.jsonl"], ["task", "no.jsonl"]),
    "task function missing": ({"task": "python:no.py:f"}, ["--task", "python:no.py:f"], ["task", "no.py"]),
    "data set missing": ({"task": "dataset:nowhere"}, ["--task", "dataset:nowhere"], ["task", "nowhere"]),
    "task option misspelt": (
        {"task_options": {"cuont": 3}}, ["--task-option", "cuont=3"], ["builtin:largest.cuont", "count"],
    ),
    "task option out of range": (
        {"task_options": {"digits": 0}}, ["--task-option", "digits=0"], ["builtin:largest.digits", "0"],
    ),
    "task option is a list": ({"task_options": {"count": [3]}}, [], ["task_options", "count"]),
    "task option without value": ({"task_options": 3}, ["--task-option", "count"], ["task"]),
    "reward without file": ({"reward": "accuracy"}, ["--reward", "accuracy"], ["reward", "python:FILE:FUNCTION"]),
    "reward file missing": ({"reward": ["python:no.py:f"]}, ["--reward", "python:no.py:f"], ["reward", "no.py"]),
    "plugin missing": ({"plugins": ["no.py"]}, ["--plugin", "no.py"], ["plugins", "no.py"]),
    "plugin of another kind": ({"plugins": ["run.toml"]}, ["--plugin", "run.toml"], ["plugins", "run.toml"]),
    "tracker misspelt": (
        {"trackers": "tensorbord"}, ["--tracker", "tensorbord"], ["tracker", "tensorbord", "tensorboard"],
    ),
    "tracker not installed": ({"trackers": ["aim"]}, ["--tracker", "aim"], ["trackers", "aim", "pip install"]),
    "more processes than there are": ({"trainer": {"ranks": 3}}, ["--ranks", "3"], ["ranks", "3", "torchrun"]),
    "no such model": ({"language": {"model": "./none"}}, ["--model", "./none"], ["model", "./none", "smollm2"]),
    "tiny model misspelt": ({"language": {"model": "tiny:2"}}, ["--model", "tiny:2"], ["model", "tiny:LAYERSxWIDTH"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run in, and no model to load."""
    monkeypatch.chdir(tmp_path)

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)


def refused(argv: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command line refuses."""
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.endswith("\n") and message.count("\n") == 1
    assert all(name.lower() in message.lower() for name in names), message
    return message


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_configurations_are_refused_from_python(bad: Bad) -> None:
    values, _, names = bad
    with pytest.raises(ConfigError) as found:
        build(configure(values))
    assert "\n" not in str(found.value)
    assert all(name.lower() in str(found.value).lower() for name in names), found.value


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_configurations_are_refused_from_files(bad: Bad, capsys: pytest.CaptureFixture[str]) -> None:
    values, _, names = bad
    Path("run.toml").write_text(as_toml(values))
    refused(["train", "run.toml"], names, capsys)


@pytest.mark.parametrize(
    "bad", [bad for bad in BAD.values() if bad[1]], ids=[key for key in BAD if BAD[key][1]]
)
def test_bad_configurations_are_refused_from_flags(bad: Bad, capsys: pytest.CaptureFixture[str]) -> None:
    _, flags, names = bad
    if "lr" in names and "-1e-05" in names:
        names = ["--lr", "-1e-5"]  # as it was written
    refused(
        ["train", *flags],
        [name.replace("_", "-") if f"--{name}" in flags else name for name in names],
        capsys,
    )


def as_toml(values: dict[str, Any]) -> str:
    """Any values as TOML, the wrong ones too."""

    def value(of: Any) -> str:
        return {"inf": "inf", "nan": "nan"}.get(str(of)) or json.dumps(of)

    tables = {name: table for name, table in values.items() if isinstance(table, dict)}
    lines = [f"{name} = {value(of)}" for name, of in values.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {value(of)}" for key, of in table.items())]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        b"lr = ",
        b"\xff\xfe",
        b"[trainer",
        b"a = 1\na = 2",
        b"[trainer]\n[trainer]",
        b"x = " + b"[" * 5000,
        b"\x00",
        b"= 3",
    ],
)
def test_files_that_are_not_toml_are_refused(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_bytes(content)
    refused(["train", "run.toml"], ["run.toml"], capsys)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "absent.toml"], ["absent.toml"]),
        (["train", "."], [".", "configuration file"]),
        (["train", "a\x00b"], ["a"]),
        (["train", "one.toml", "two.toml"], ["two.toml"]),
        (["train", "--seed"], ["--seed", "value"]),
        (["train", "--seed", "--lr", "1"], ["--seed", "value"]),
        (["train", "-lr", "1"], ["-lr", "--lr"]),
        (["train", "--max_new_tokens", "3"], ["--max_new_tokens", "--max-new-tokens"]),
        (["train", "--dry-run=3"], ["--dry-run"]),
        (["resume"], ["RUN"]),
        (["resume", "nowhere"], ["nowhere", "no run"]),
        (["resume", "nowhere", "--lr", "3"], ["--lr", "--iterations"]),
        (["eval", "nowhere"], ["nowhere", "no run"]),
        (["eval", "nowhere", "--checkpoint", "x"], ["--checkpoint", "x"]),
        (["methods", "--jsn"], ["--jsn", "--json"]),
        (["tasks", "all"], ["all"]),
    ],
)
def test_bad_command_lines_are_refused(
    argv: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(argv, names, capsys)


def test_escapes_in_values_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["train", "--method", "\x1b[31mgrpo\u202e\nnext"], ["method"], capsys)
    assert "\x1b" not in message and "\u202e" not in message


def test_long_values_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(refused(["train", "--lr", "x" * 100_000], ["--lr", "number"], capsys)) < 300


def test_missing_libraries_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match=r"reasoning_gym.*polopt\[language\]"):
        prepare(RunConfig.create("", task="reasoning_gym:chain_sum"))


def test_refusals_come_before_torch_is_imported() -> None:
    needs_torch = {
        "options that contradict", "transform without estimator", "two estimators", "signal that nobody provides",
        "the method's minibatches, fewer rollouts", "task option misspelt", "task option out of range",
        "more processes than there are",
    }  # fmt: skip
    lines = [["train", *flags] for name, (_, flags, _) in BAD.items() if flags and name not in needs_torch]
    program = f"""
import sys
from polopt.cli import main
for argv in {lines!r}:
    assert main(argv) == 2, argv
    assert "torch" not in sys.modules, argv
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == len(lines) > 60


def test_refusal_of_a_real_process_is_one_line_and_code_2() -> None:
    program = "import sys; from polopt.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", program, "train", "--advantage", "adora"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "20"}
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert (
        result.stderr == "polopt: advantage adora: changes another advantage; name an estimator before it\n"
    )


def test_catalog_agrees_with_the_registry() -> None:
    from polopt.parts import SLOTS
    from polopt.registry import parts, recipes

    def bounds(field: Any) -> list[Any]:
        return [
            bound
            for bound in field.metadata
            if any(hasattr(bound, name) for name in ("ge", "gt", "le", "lt"))
        ]

    catalog, own = Catalog(), "polopt.methods."
    assert catalog.recipes == {
        name for name, recipe in recipes().items() if recipe.__module__.startswith(own)
    }
    for slot, base in SLOTS.items():
        real = {name: part for name, part in parts(slot).items() if part.__module__.startswith(own)}
        assert set(catalog.parts[slot]) - {"default"} == set(real)
        for name, node in catalog.parts[slot].items():
            fields = {"default": base, **real}[name].Config.model_fields
            read = catalog.settings(node).model_fields
            assert read.keys() == fields.keys(), (slot, name)
            for option, field in fields.items():
                assert read[option].annotation in (field.annotation, Any), (slot, name, option)
                assert bounds(read[option]) == bounds(field), (slot, name, option)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
run_values = st.fixed_dictionaries(
    {},
    optional={
        "method": text,
        "task": text,
        "surrogate": st.none() | text,
        "regularizers": st.none() | st.lists(text, max_size=3),
        "task_options": st.dictionaries(
            text, text | st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False), max_size=3
        ),
        "trackers": st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
        "trainer": st.fixed_dictionaries(
            {}, optional={"lr": st.floats(1e-300, 1e300), "seed": st.integers(0), "skip_silent": st.booleans()}
        ),
        "language": st.fixed_dictionaries({}, optional={"model": text, "top_p": st.floats(1e-9, 1)}),
    },
)  # fmt: skip


@given(run_values)
def test_toml_round_trip(values: dict[str, Any]) -> None:
    config = configure(values)
    assert configure(tomllib.loads(to_toml(config))) == config


def test_no_clipping_is_infinity_in_every_form_of_a_configuration() -> None:
    given = configure({"trainer": {"max_grad_norm": "inf"}})
    assert given.trainer.max_grad_norm == math.inf
    assert "max_grad_norm = inf\n" in to_toml(given)
    assert configure(tomllib.loads(to_toml(given))) == given


KEYS = [(key,) for key in RunConfig.model_fields] + [
    (s, k) for s, m in SECTIONS.items() for k in m.model_fields
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates()
anything = scalars | st.lists(scalars, max_size=3) | st.dictionaries(text, scalars, max_size=3)


@given(st.sampled_from(KEYS), anything, st.booleans())
def test_any_value_of_any_key_is_accepted_or_refused_in_words(
    path: tuple[str, ...], value: Any, flag: bool
) -> None:
    *table, key = path
    values = {table[0]: {key: value}} if table else {key: value}
    try:
        configure(values, {path: "--flag"} if flag else {}, "run.toml")
    except ConfigError as error:
        message = str(error)
        assert message.startswith(("--flag", f"run.toml: {'.'.join(path)}", f"run.toml: {key}")), message
        assert len(message) < 1500


def test_flags_override_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(
        'method = "rloo"\nreward = []\n[task_options]\ncount = 3\n[trainer]\nlr = 1e-4\nseed = 7\n'
        '[language]\nmodel = "tiny:2x32"\ntemperature = 0.5\n'
    )
    flags = [
        "--seed",
        "3",
        "--task-option",
        "digits=1",
        "--surrogate",
        "gspo",
        "--temperature=0.8",
        "--steps",
        "5",
    ]
    assert main(["train", "run.toml", *flags, "--dry-run"]) == 0
    config = configure(tomllib.loads(capsys.readouterr().out))
    assert (config.method, config.surrogate, config.task_options) == (
        "rloo",
        "gspo",
        {"count": 3, "digits": "1"},
    )
    assert (config.trainer.lr, config.trainer.seed, config.trainer.iterations) == (1e-4, 3, 5)
    assert (config.language.model, config.language.temperature) == ("tiny:2x32", 0.8)


def test_bad_table_of_a_file_is_not_hidden_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("trainer = 3")
    refused(["train", "run.toml", "--seed", "3"], ["run.toml", "trainer", "3"], capsys)


def test_message_names_the_file_only_if_the_file_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("[trainer]\nlr = -1.0")
    assert refused(["train", "run.toml"], [], capsys).startswith("polopt: run.toml: trainer.lr = -1.0: ")
    assert refused(["train", "run.toml", "--lr", "-2"], [], capsys).startswith("polopt: --lr = '-2': ")


def test_method_defaults_become_part_of_the_resolved_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--dry-run", "--method", "ppo", "--minibatches", "2", "--model", "tiny:2x32"]) == 0
    resolved = tomllib.loads(capsys.readouterr().out)
    assert (resolved["trainer"]["epochs"], resolved["trainer"]["minibatches"]) == (4, 2)


def test_one_text_is_a_list_of_one() -> None:
    assert configure({"advantage": "bnpo"}).advantage == ["bnpo"]


def test_empty_list_takes_out_what_the_recipe_has() -> None:
    prepared = prepare(configure({"method": "ppo", "regularizers": [], "advantage": "rloo"}))
    prepared.task.close()
    assert len(prepared.method.regularizers) == 0


def test_unreadable_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="absent"):
        read_toml(Path("absent"))


def test_configuration_in_the_documentation_works(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    prepare(configure(tomllib.loads(block))).task.close()
    for line, answer in re.findall(r"\$ polopt (train \S+ \S+)\n(polopt: .*)\n", page):
        assert refused(line.split(), [], capsys).startswith(answer.removesuffix("..."))
