"""The house: who may import whom, what `import polopt` costs, and what no module may ever do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "polopt"
MODULES = sorted(PACKAGE.rglob("*.py"))

CONTRACT = {"batch", "functional", "settings"}
DOMAIN = CONTRACT | {"domain", "engine"}
EVERYTHING = {path.stem if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0] for path in MODULES}
ALLOWED = {
    "errors": set(),
    "settings": set(),
    "batch": set(),
    "functional": {"batch"},
    "domain": {"batch"},
    "adamw": {"functional"},
    "parts": CONTRACT | {"adamw"},
    "method": CONTRACT | {"parts"},
    "registry": {"method", "methods", "parts", "settings"},
    "methods": CONTRACT | {"method", "parts", "registry"},
    "engine": CONTRACT | {"domain", "method", "parts", "trainer_config"},
    "trainer_config": {"settings"},
    "trainer": DOMAIN | {"method", "parts", "trainer_config"},
    "miniature": DOMAIN,
    "miniature_config": {"settings"},
    "language": DOMAIN,
    "control": DOMAIN,
    "diffusion": DOMAIN,
    "offline": DOMAIN,
    "inventory": DOMAIN,
    "report": {"engine", "functional", "settings"},
    "testing": DOMAIN | {"method", "methods", "miniature", "parts", "registry"},
    "config": EVERYTHING - {"cli"},
    "integrations": EVERYTHING - {"cli"},
    "cli": EVERYTHING,
    "__init__": EVERYTHING - {"cli"},
    "__main__": {"cli"},
}
"""What each module or folder of the package may import, besides itself and `errors`."""

LAZY = {
    "accelerate", "datasets", "diffusers", "gguf", "gymnasium", "imageio", "math_verify", "matplotlib", "minari", "mujoco",
    "peft", "plotly", "reasoning_gym", "rich", "tensorboard", "textworld", "trackio", "transformers", "trl", "tyro",
    "verl", "wandb",
}  # fmt: skip
"""What `import polopt` must not load."""


def layer(path: Path) -> str:
    """The module or folder directly under the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of what a module of `package` imports, inside functions too, but not for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported(other, package)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        yield from imported(node, package)


def layers_imported(source: str, package: str = "polopt") -> set[str]:
    """Layers of polopt that a module's source imports."""
    names = (name.split(".") for name in imported(ast.parse(source), package))
    return {parts[1] for parts in names if parts[0] == "polopt" and len(parts) > 1}


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("import polopt.trainer", {"trainer"}),
        ("from polopt import trainer", {"trainer"}),
        ("from polopt.engine.ranks import Ranks", {"engine"}),
        ("from ..engine import ranks", {"engine"}),
        ("from . import sampler", {"language"}),
        ("def f():\n    from polopt.cli import main", {"cli"}),
        ("if TYPE_CHECKING:\n    import polopt.cli", set()),
        ("import torch, polopt", set()),
    ],
)
def test_layers_of_imports_are_found(source: str, layers: set[str]) -> None:
    assert layers_imported(source, "polopt.language") == layers


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    here = layer(path)
    assert here in ALLOWED, f"polopt.{here} is new: say in ALLOWED what it may import"
    package = ".".join(["polopt", *path.relative_to(PACKAGE).parent.parts])
    found = layers_imported(path.read_text(), package) & EVERYTHING
    assert found <= ALLOWED[here] | {here, "errors"}, f"polopt.{here} must not import these"


def run_python(source: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_polopt_loads_no_optional_library() -> None:
    loaded = run_python("import sys, polopt; print(*{name.partition('.')[0] for name in sys.modules})")
    assert "polopt" in loaded.split()
    assert not set(loaded.split()) & LAZY


def test_contract_trainer_and_methods_work_without_extras() -> None:
    run_python(
        f"""
import sys
for name in {sorted(LAZY - {"rich", "tyro"})}:
    sys.modules[name] = None  # importing it raises ImportError
import polopt
polopt.Trainer, polopt.TrainerConfig, polopt.Batch
for name in polopt.recipes():
    polopt.recipe(name)
"""
    )


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "os.system", "os.popen", "pandas.read_pickle"}
FORBIDDEN_KEYWORDS = {"weights_only=False", "trust_remote_code=True", "shell=True", "allow_pickle=True"}
FORBIDDEN_TEXT = re.compile(
    r"(?<![\w.])(?:eval|exec)\(|\bimport pickle\b|" + "|".join(sorted(FORBIDDEN_KEYWORDS))
)


def dangers(source: str) -> list[str]:
    """What in a module's source could run code from a file or a string, programs inside its strings included."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)
    }
    found = [
        name
        for name in imported(tree, "polopt")
        if name.split(".")[0] in FORBIDDEN_IMPORTS or name == "torch.load"
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += FORBIDDEN_CALLS & {ast.unparse(node.func)}
            found += FORBIDDEN_KEYWORDS & {
                f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords
            }
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            found += FORBIDDEN_TEXT.findall(node.value)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "torch.load(path)",
        "from torch import load",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "f(weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "program = 'exec(input())'",
    ],
)
def test_every_danger_is_recognised(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "'retrieval(x)'", "def f():\n    'Never call eval(x).'", "json.load(file)"]
)
def test_harmless_code_is_not_a_danger(source: str) -> None:
    assert not dangers(source)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_code_from_data(path: Path) -> None:
    assert not dangers(path.read_text())


FOLDERS = [".ci", "benchmarks", "docs", "examples", "src", "tests", "tools"]
MACHINE_PATH = re.compile(r"(?<![\w./])/(?:root|work|home/[\w.-]+|Users/[\w.-]+)/\w")


def test_no_text_names_a_path_of_one_machine() -> None:
    assert MACHINE_PATH.search("see " + "/".join(["", "home", "me", "file"]))
    texts = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    texts += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = [path for path in texts if "__pycache__" not in path.parts]
    assert len(texts) > 20
    found = {
        str(path.relative_to(ROOT)): hit
        for path in texts
        if (hit := MACHINE_PATH.search(path.read_text(errors="replace")))
    }
    assert not found
