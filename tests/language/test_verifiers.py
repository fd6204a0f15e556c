"""Answers are extracted before they are graded, equal answers are equal, and nothing hangs."""

import math
import os
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.errors import ConfigError
from polopt.language import reasoning_gym_reward
from polopt.language.answers import canonical, extractor, normalize, parse_number
from polopt.language.examples import Example
from polopt.language.graders import Exact, Format, Functions, Math, Numeric
from polopt.language.reward_workers import RewardPool
from polopt.language.verifiers import Verifier, make_graders
from polopt.language.worker_process import FunctionSource


def example(answer: str) -> Example:
    return Example(0, "question", answer)


def verify(spec: str, extract: str, pairs: list[tuple[str, str]], **options: float) -> list[float]:
    with Verifier(make_graders([spec], workers=1, **options), extract) as verifier:  # type: ignore[arg-type]
        return verifier.score([c for c, _ in pairs], [example(a) for _, a in pairs]).rewards[:, 0].tolist()


@pytest.mark.parametrize(
    ("spec", "completion", "answer"),
    [
        ("last_number", "7 plus 5 is 12.", "12"),
        ("last_number", "It costs $1,234.50!", "1,234.50"),
        ("last_number", "10-4", "4"),
        ("last_number", "x=-3", "-3"),
        ("last_number", "(5)-2", "2"),
        ("last_number", "minus \u22127", "\u22127"),
        ("last_number", "-$5", "-$5"),
        ("last_number", "3/4 of it", "3/4"),
        ("last_number", "about 6.02e23", "6.02e23"),
        ("last_number", ".5", ".5"),
        ("last_number", "12,34", "34"),
        ("last_number", "none", None),
        ("last_number", "", None),
        ("first_line", " 42 \n43", "42"),
        ("first_line", "\n42", None),
        ("whole", " a\nb ", "a\nb"),
        ("whole", " \n ", None),
        ("boxed", r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1", None),
        ("boxed", "1", None),
        ("boxed", r"\boxed{}", None),
        ("tag:answer", "<answer>1</answer> <answer> 2 </answer>", "2"),
        ("tag:answer", "<answer>1</answer> <answer>2", "1"),
        ("tag:answer", "</answer><answer>", None),
        ("tag:answer", "<answer></answer>", None),
        ("tag:final", "<answer>1</answer>", None),
        ("regex:#### (\\d+)", "#### 1 #### 23", "23"),
        ("regex:[a-z]+", "ab cd 9", "cd"),
        ("regex:(x)?y", "y", None),
    ],
)
def test_extraction(spec: str, completion: str, answer: str | None) -> None:
    assert extractor(spec)(completion) == answer


@pytest.mark.parametrize("spec", ["last", "tag:", "tag:a b", "regex:", "regex:(", "boxed:x"])
def test_unknown_extractions_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="extract = "):
        extractor(spec)


@pytest.mark.parametrize("spec", ["last_number", "first_line", "whole", "boxed", "tag:answer"])
@pytest.mark.parametrize(
    "unit", ["1", "1,", "1,111", "<answer>", "</answer>", r"\boxed{", "{", "-", "1e", ".1", "1/"]
)
def test_extraction_takes_linear_time(spec: str, unit: str) -> None:
    started = time.process_time()
    extractor(spec)(unit * 20_000)
    assert time.process_time() - started < 5, "a quadratic one takes minutes"


@given(st.text(max_size=200))
def test_extraction_never_fails(text: str) -> None:
    for spec in ("last_number", "first_line", "whole", "boxed", "tag:answer"):
        found = extractor(spec)(text)
        assert found is None or (found and found == found.strip())
        assert found is None or isinstance(canonical(found), str)


@given(st.fractions(), st.sampled_from(["{}", " {} ", "${}", "{}.", "+{}"]))
def test_numbers_are_read_exactly_however_they_are_written(value: Fraction, form: str) -> None:
    text = form.format(abs(value))
    assert parse_number(text) == abs(value)
    assert canonical(text) == str(abs(value))


@given(st.integers(-(10**12), 10**12))
def test_separators_signs_and_decimals_do_not_matter(value: int) -> None:
    for text in (str(value), f"{value:,}", f"{value}.00", f"{value}/1", str(value).replace("-", "\u2212")):
        assert parse_number(text) == value
        assert extractor("last_number")(f"so it is {text} .") == text


@pytest.mark.parametrize(
    "text", ["", "x", "1,23", "1/0", "1 2", "--1", "1e9999", "9" * 5000, "nan", "inf", "0x10", "1_0"]
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


def test_normalisation_keeps_what_matters() -> None:
    assert normalize(" a \n b. ") == "a b"
    assert normalize("e\u0301") == normalize("\u00e9")
    assert len({normalize(text) for text in ("a b", "ab", "A b", "a-b", "x2", "x\u00b2")}) == 6


def test_exact() -> None:
    pairs = [
        ("blue", "blue"),
        (" blue .\nred", "blue"),
        ("Blue", "blue"),
        ("it is blue", "blue"),
        ("", "blue"),
        ("1.0", "1"),
    ]
    assert verify("exact", "first_line", pairs) == [1, 1, 0, 0, 0, 0]


def test_numeric_is_exact_without_tolerances() -> None:
    pairs = [
        ("1/2", "0.5"),
        ("1,000", "1000"),
        ("$5", "5"),
        ("0.333", "1/3"),
        ("10000000001", "10000000000"),
        ("x", "1"),
    ]
    assert verify("numeric", "whole", pairs) == [1, 1, 1, 0, 0, 0]
    assert verify("numeric", "whole", [("0.333", "1/3"), ("0.3", "1/3")], rel_tol=0.01) == [1, 0]
    assert verify("numeric", "whole", [("99", "100"), ("98", "100"), ("-99", "100")], abs_tol=1) == [1, 0, 0]


@pytest.mark.parametrize(
    ("field", "value"), [("abs_tol", -1.0), ("rel_tol", math.nan), ("rel_tol", math.inf)]
)
def test_impossible_tolerances_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Numeric(**{field: value})


def test_scores_hold_columns_names_format_and_canonical_answers() -> None:
    with Verifier([Numeric(), Format()], "tag:answer") as verifier:
        completions = ["<answer>0.50</answer>", "1/2", "<answer>2/4</answer>", "<answer>x  y</answer>"]
        scores = verifier.score(completions, [example("1/2")] * 4)
    assert scores.names == verifier.names == ("numeric", "format")
    assert scores.rewards.dtype == torch.float64
    assert scores.rewards.tolist() == [[1, 1], [0, 0], [1, 1], [0, 1]]
    assert scores.format_ok.tolist() == [True, False, True, True]
    assert scores.answers == ("1/2", None, "1/2", "x y")
    assert not scores.faults.total


def test_no_completions_give_no_scores() -> None:
    scores = Verifier([Exact(), Format()], "whole").score([], [])
    assert scores.rewards.shape == (0, 2)
    assert scores.answers == ()


def test_every_completion_needs_its_example() -> None:
    with pytest.raises(ValueError, match="zip"):
        Verifier([Exact()], "whole").score(["a", "b"], [example("a")])


def test_a_catastrophic_pattern_of_the_users_costs_its_row() -> None:
    with Verifier([Exact(), Format()], "regex:^(a+)+$", timeout=0.5) as verifier:
        scores = verifier.score(["aaa", "a" * 60 + "b", "aa"], [example("aaa"), example("b"), example("aa")])
    assert scores.format_ok.tolist() == [True, False, True]
    assert scores.faults.timeouts == 1


MATH = [
    (r"\frac{1}{2}", "0.5", 1.0),
    ("1/2", r"\frac{1}{2}", 1.0),
    ("x^2+2x+1", "(x+1)^2", 1.0),
    (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
    (r"\{1,2\}", r"\{2,1\}", 1.0),
    ("(1,2)", "(2,1)", 0.0),
    ("3", "4", 0.0),
    ("?", "4", 0.0),
    ("__import__('os').system('touch CANARY')", "4", 0.0),
    ("eval(chr(49))", "1", 0.0),
]


def test_math_is_symbolic_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    pairs = [(rf"so \boxed{{{final}}}", answer) for final, answer, _ in MATH]
    with Verifier([Math(workers=1, timeout=20)], "boxed") as verifier:
        scores = verifier.score(
            [c for c, _ in pairs] + ["4"], [example(a) for _, a in pairs] + [example("4")]
        )
        assert scores.rewards[:, 0].tolist() == [reward for *_, reward in MATH] + [0.0]
        assert not scores.faults.total
        again = verifier.score([r"\boxed{4}"], [example("")])
    assert again.rewards.isnan().all()
    assert again.faults.errors == 1
    assert not os.listdir(tmp_path)


def test_math_that_hangs_costs_its_row() -> None:
    pytest.importorskip("math_verify")
    bomb = r"\boxed{9^{9^{9^{9}}}}"
    with Verifier([Math(workers=1, timeout=1.0)], "boxed") as verifier:
        verifier.score([r"\boxed{1}"], [example("1")])
        scores = verifier.score([bomb, r"\boxed{1}"], [example("9^{9^{9^{8}}}+1"), example("1")])
    assert scores.rewards[1, 0] == 1.0
    assert scores.rewards[0, 0] != 1.0


def test_the_users_function_gets_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def brevity(completion, answer, prompt, level=0): return 10 * level + len(completion) - len(answer + prompt)\n"
        "def never(): return None\n"
    )
    metadata = {"level": 1, "answer": "shadowed", "prompt": "shadowed", "completion": "shadowed"}
    examples = [Example(0, "question", "ab", metadata), example("ab")]
    graders = make_graders([f"python:{path}:brevity", f"python:{path}:never", "exact"], workers=1)
    with Verifier(graders, "last_number") as verifier:
        scores = verifier.score(["x" * 20, "x" * 20], examples)
    assert scores.names == ("brevity", "never", "exact")
    assert scores.rewards[:, 0].tolist() == [20, 10], "also without a final answer"
    assert scores.rewards[:, 1].isnan().all()
    assert scores.faults.missing == 2


def test_functions_in_process_need_no_file() -> None:
    pool = RewardPool([lambda completion: len(completion)], in_process=True)
    with Verifier([Functions(pool)], "whole") as verifier:
        assert verifier.score(["abc"], [example("")]).rewards.item() == 3.0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("exat", "did you mean 'exact'"),
        ("exact,exact", "different names"),
        ("python:x.py", "write python:FILE"),
        ("python:missing.py:reward", "missing.py"),
        ("", "unknown"),
    ],
)
def test_bad_verifiers_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Verifier(make_graders(spec.split(",")), "whole")


HOSTILE = [
    "__import__('os').system('touch CANARY')",
    "[__import__('os').system('touch CANARY')]",
    "().__class__.__base__.__subclasses__()",
    "open('CANARY', 'w')",
    "eval(chr(49))",
    "exec(input())",
    "x.__class__",
    "Integral(x, x)",
    "lambda: 0",
    "[i for i in (1, 2)]",
    "f'{1}'",
    "\uff45\uff58\uff45\uff43(x)",
    "9 if 1else exec(x)",
]


@pytest.mark.parametrize("read", [reasoning_gym_reward.read_literal, reasoning_gym_reward.read_formula])
@pytest.mark.parametrize("text", HOSTILE)
def test_readers_of_answers_run_nothing(
    read: Callable[[str], object], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SyntaxError)):
        read(text)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 'a', (2,)]", [1, "a", (2,)]),
        ("-3 * (2 + 1)", -9),
        ("0x10 << 2", 64),
        ("{1: 2}", {1: 2}),
        (" 7 // 2", 3),
    ],
)
def test_literals_and_arithmetic_are_read(text: str, value: object) -> None:
    assert reasoning_gym_reward.read_literal(text) == value


def test_arithmetic_is_for_numbers() -> None:
    with pytest.raises(ValueError, match="arithmetic"):
        reasoning_gym_reward.read_literal("[0] * 10")


def test_formulas_are_read() -> None:
    formula = reasoning_gym_reward.read_formula("2*x**2 + sin(x)/3 - log(x) + sqrt(x)")
    assert str(formula.diff("x").subs("x", 1).evalf(4)) == str(4 + math.cos(1) / 3 - 1 + 0.5)[:5]


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_rewards_of_a_function_come_back_unchanged(values: list[float]) -> None:
    pool = RewardPool([lambda completion: float(completion)], in_process=True)
    with Verifier([Functions(pool)], "whole") as verifier:
        scores = verifier.score([repr(value) for value in values], [example("")] * len(values))
    assert scores.rewards[:, 0].tolist() == values


def test_a_source_with_options_is_a_maker_of_functions(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def at_least(n):\n    def reward(completion): return len(completion) >= n\n    return reward"
    )
    with RewardPool([FunctionSource(str(path), "at_least", {"n": 3})], workers=1) as pool:
        assert pool.score([{"completion": "ab"}, {"completion": "abc"}])[0][:, 0].tolist() == [0, 1]
