"""reasoning-gym's scorers, loaded in worker processes only.

Some of them evaluate the answer as Python (`eval`, sympy's `parse_expr`), and the answer is written by a model. Here
both names are bound to readers that know numbers, lists and elementary formulas and nothing else, so that an answer is
never run, and "Integral(f(x), x)" is no answer to the question for the integral of f.
"""

import ast
import operator
import re
import sys
from collections.abc import Callable
from typing import Any

import reasoning_gym
import sympy
from reasoning_gym.dataset import ProceduralDataset
from sympy.parsing.sympy_parser import parse_expr

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
}  # fmt: skip
_SPECIAL = (
    "sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt erf Abs pi"
)
_NAMES = frozenset(_SPECIAL.split())
_NONSENSE = "nonsense ?!"
_FORMULA = re.compile(r"[\w\s+\-*/^().,!]*")
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]")
_NAME = re.compile(r"(?<!\w)[^\W\d]\w*")


def scorer(name: str, options: dict[str, Any], partial_credit: bool) -> Callable[..., float]:
    """The scorer of one generator, as a reward function of an extracted answer.

    Args:
        name: the generator's.
        options: the generator's.
        partial_credit: graded scores; otherwise full marks are 1 and all else is 0.

    Returns:
        `reward(completion, entry)`. Generators without a scorer of their own are scored by equality, since the default
        one gives partial credit for any text that contains the right answer; so are those whose scorer gives full marks
        to nonsense.
    """
    dataset = reasoning_gym.create_dataset(name, **options)
    _disarm()
    has_own = type(dataset).score_answer is not ProceduralDataset.score_answer
    by_equality = not has_own or _read(dataset.score_answer, _NONSENSE, dataset[0]) >= 1.0

    def reward(completion: str, entry: dict[str, Any]) -> float:
        if by_equality:
            return float(completion.strip() == entry["answer"].strip())
        score = _read(dataset.score_answer, completion, entry)
        return score if partial_credit else float(score >= 1.0)

    return reward


def _read(score_answer: Callable[..., float], answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(score_answer(answer, entry))
    except (ValueError, SyntaxError):  # an answer that the scorer cannot read is wrong
        return 0.0


def read_literal(text: str) -> Any:
    """The value of numbers, texts, lists, tuples and sets, and of arithmetic on numbers.

    Raises:
        ValueError: anything else.
        SyntaxError: not an expression.
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.BinOp():
                return _OPERATORS[type(node.op)](_number(value(node.left)), _number(value(node.right)))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](_number(value(node.operand)))
        return ast.literal_eval(node)

    return value(ast.parse(text.strip(), mode="eval"))


def read_formula(text: str, *arguments: Any, **keywords: Any) -> Any:
    """sympy's `parse_expr` for formulas alone: numbers, one-letter symbols and elementary functions.

    Raises:
        ValueError: there is anything else in the text.
    """
    names = {name for name in _NAME.findall(text) if len(name) > 1}
    if names - _NAMES or _ATTRIBUTE.search(text) or not _FORMULA.fullmatch(text):
        raise ValueError(f"not a formula: {text[:80]!r}")
    return parse_expr(text, *arguments, **keywords)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ValueError(f"arithmetic on a {type(value).__name__}")
    return value


def _disarm() -> None:
    """Replace `eval` and `parse_expr` wherever a scorer would find them."""
    sympy.__dict__["parse_expr"] = read_formula
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            module.__dict__["eval"] = read_literal
            if module.__dict__.get("parse_expr") is parse_expr:
                module.__dict__["parse_expr"] = read_formula
