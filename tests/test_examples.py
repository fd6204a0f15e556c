"""The example that the documentation shows works as it says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import polopt
from polopt.miniature import SumModActor, SumModTask

EXAMPLE = Path(__file__).parents[1] / "examples" / "new_method.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("new_method", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_is_forty_lines(example) -> None:
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) <= 40


def test_example_is_the_policy_gradient_at_ratio_one_and_brakes_at_its_optimum(example) -> None:
    x = torch.tensor([[0.0, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = example.soft_trust_loss(1 + x, torch.ones(1, 2, dtype=torch.float64), 5.0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert_close(gradient, torch.tensor([[-1.0, 0.0]], dtype=torch.float64))


def test_example_learns(example) -> None:
    task = SumModTask()
    config = polopt.TrainerConfig(iterations=60, prompts=24, rollouts=8, lr=0.01)
    finals = [
        polopt.Trainer(SumModActor(task, seed=s), task, polopt.recipe("soft_trust"), config).run()["after"][
            "score"
        ]
        for s in range(3)
    ]
    assert sorted(finals)[1] > 0.6, finals
