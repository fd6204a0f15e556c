"""The compiled gradient is the one that is not compiled, whatever the parts change in Python meanwhile."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.cli import main
from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.engine.compiled import CompiledGradient
from polopt.engine.gradient import Backward, backward
from polopt.errors import ConfigError, PoloptError
from polopt.parts import Regularizer
from polopt.trainer import Trainer

COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER}")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at its import


@pytest.fixture(autouse=True)
def as_outside_of_tests() -> Iterator[None]:
    """Nothing is compiled before or afterwards, and signatures are not checked, which would be a part of the graph."""
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


def trainer(method: str = "ppo", out: Path | None = None, **options: Any) -> Trainer:
    """A small run in CartPole, in float64."""
    sizes = {"iterations": 4, "prompts": 3, "rollouts": 2, "epochs": 2, "minibatches": 3, "score_prompts": 2}
    sizes |= {"checkpoint_every": 2, **options.pop("trainer", {})}
    control = {"dtype": "float64", "normalize_observations": True, **options.pop("control", {})}
    options = {"method": method, "task": "CartPole-v1", "domain": "control", **options}
    return build(RunConfig.create("", trainer=sizes, control=control, **options), out=out)


def minibatches(run: Trainer, count: int) -> list[Batch]:
    """The last minibatches of iterations, with what the trainer knows of them."""
    seen: list[Batch] = []
    take = run.stepper.take

    def spy(batch: Batch, *given: Any) -> Any:
        seen.append(batch)
        return take(batch, *given)

    run.stepper.take = spy
    for _ in range(count):
        run.iterate()
    return seen[:: len(seen) // count]


def gradients(run: Trainer) -> list[Tensor | None]:
    """Those in the parameters, which are without any afterwards."""
    found = [p.grad for p in run.parameters]
    for parameter in run.parameters:
        parameter.grad = None
    return found


def assert_same(run: Trainer, compiled: CompiledGradient, batch: Batch) -> float:
    """Loss, evaluation and gradients are equal to 1e-10; returns the largest entry of the gradient."""
    rows, options = torch.arange(len(batch)), run.method.evaluation_options()
    eager = backward(
        run.actor, batch, run.method.objective, run.method.evaluated, separable=True, options=options
    )
    expected = gradients(run)
    found = compiled.backward(batch, rows, options)
    torch.testing.assert_close(found.loss, eager.loss, rtol=1e-10, atol=1e-10)
    for name, tensor in eager.evaluation.tensors().items():
        torch.testing.assert_close(
            found.evaluation.tensors()[name][batch.mask], tensor[batch.mask], rtol=1e-10, atol=1e-10
        )
    torch.testing.assert_close(gradients(run), expected, rtol=1e-10, atol=1e-10)
    return max(float(g.abs().max()) for g in expected if g is not None)


def compiled_of(run: Trainer, usual_rows: int | None = None) -> CompiledGradient:
    return CompiledGradient(run.actor, run.method.objective, run.method.evaluated, usual_rows)


@needs_compiler
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mdpo", {}),
        ("gspo", {}),
        pytest.param("ppo", {}, marks=pytest.mark.slow),
        pytest.param("grpo", {}, marks=pytest.mark.slow),
        pytest.param("bpo", {}, marks=pytest.mark.slow),
        pytest.param("ppo", {"surrogate": "mhpo"}, marks=pytest.mark.slow),
        pytest.param("ppo", {"surrogate": "r2vpo"}, marks=pytest.mark.slow),
        pytest.param("dcpo", {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("surrogate", ""),
)
def test_compiled_gradients_are_the_others(method: str, options: dict[str, Any]) -> None:
    run = trainer(method, **options)
    compiled = compiled_of(run)
    largest = 0.0
    for batch in minibatches(run, 3):
        largest = max(largest, assert_same(run, compiled, batch))
        run.method.surrogate.progress -= 0.21
    assert largest > 1e-4
    close(run)


class Changing(Regularizer):
    """A penalty whose weight is a number and whose target is a buffer, both of which change between steps."""

    name = "changing"

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.weight, self.squared = 0.1, True
        self.register_buffer("target", torch.tensor(0.5, dtype=torch.float64))

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        error = evaluation.logp + self.target
        return self.weight * (error.square() if self.squared else error.exp())


@needs_compiler
@pytest.mark.parametrize("usual", [False, True])
def test_what_a_part_changes_in_python_or_in_a_buffer_takes_effect(usual: bool) -> None:
    run = trainer()
    run.method = run.method.with_parts(regularizers=[*run.method.slot("regularizers"), Changing(coef=1.0)])
    part: Any = run.method.slot("regularizers")[-1]
    (batch,) = minibatches(run, 1)
    compiled = compiled_of(run, len(batch) if usual else None)
    for weight, target, squared in [
        (0.1, 0.5, True),
        (3.0, 0.5, True),
        (0.7, -2.0, True),
        (0.7, -2.0, False),
    ]:
        part.weight, part.squared = weight, squared
        part.target.fill_(target)
        assert assert_same(run, compiled, batch) > 1e-3
    close(run)


@needs_compiler
def test_micro_batches_and_some_rows_add_up() -> None:
    run = trainer(control={"horizon": 24})
    compiled, (batch,) = compiled_of(run), minibatches(run, 1)
    rows = torch.tensor([7, 2, 3, 11])
    whole = compiled.backward(batch, rows, {})
    expected = gradients(run)
    run.actor.config = run.actor.config.model_copy(update={"micro_batch": 2})
    pieces: Backward = compiled.backward(batch, rows, {})
    torch.testing.assert_close(pieces.loss, whole.loss)
    torch.testing.assert_close(pieces.evaluation.logp, whole.evaluation.logp)
    torch.testing.assert_close(gradients(run), expected)
    close(run)


@needs_compiler
@pytest.mark.parametrize(
    ("method", "control"),
    [
        (
            "ppo",
            {"horizon": 24, "vectorization": "native", "restore": "reset"},
        ),  # minibatches of several sizes
        ("mdpo", {"horizon": 20}),  # of the usual size, and a number that changes from step to step
    ],
    ids=["ppo", "mdpo"],
)
def test_a_resumed_compiled_run_is_the_uninterrupted_one(
    method: str, control: dict[str, Any], tmp_path: Path
) -> None:
    options: Any = {
        "method": method,
        "trainer": {"compile": True, "minibatches": 5},
        "control": {"dtype": "float32", **control},
    }
    whole = trainer(out=tmp_path / "whole", **options)
    whole.run()
    first: Any = trainer(out=tmp_path / "part", **options)
    first._stopped = lambda: first.iteration == 2
    first.run()
    close(first)
    torch.compiler.reset()
    resumed = trainer(out=tmp_path / "part", **options)
    resumed.run(resume=True)
    for one, other in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other)
    close(whole)
    close(resumed)


class Branching(Regularizer):
    """A penalty that branches on a tensor's value."""

    name = "branching"

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return evaluation.logp if bool(evaluation.logp.mean() > 0) else -evaluation.logp


@needs_compiler
def test_a_loss_that_branches_on_a_value_is_refused() -> None:
    run = trainer()
    run.method = run.method.with_parts(regularizers=[Branching()])
    (batch,) = minibatches(run, 1)
    with pytest.raises(PoloptError, match=r"trainer\.compile = true: this loss cannot be compiled") as caught:
        compiled_of(run).backward(batch, torch.arange(len(batch)), {})
    assert "\n" not in str(caught.value)
    close(run)


def test_without_a_compiler_it_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "nonesuch"))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    with pytest.raises(
        ConfigError, match=r"(?s)trainer.compile = true.*No working C\+\+ compiler.*set it to false"
    ):
        trainer(trainer={"compile": True})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["--domain", "miniature"], "works on control alone"),
        (["--domain", "control", "--task", "CartPole-v1", "--method", "real"], "sum over trajectories"),
    ],
    ids=["domain", "coupled"],
)
def test_what_is_no_graph_is_refused(
    settings: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings, "--compile", "true", "--out", str(tmp_path / "run")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
