"""Second derivatives of a language model's evaluation are those of its plain operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.domain import Plan
from polopt.engine.hessian import evaluation_product
from polopt.language.actor import LanguageActor
from polopt.language.config import LanguageConfig
from polopt.language.head import HeadOptions, evaluate_head
from polopt.language.rms_norm import rms_norm
from polopt.language.tasks import task_from_spec


@pytest.mark.parametrize(("softcap", "bias"), [(None, True), (3.0, False)])
def test_the_head_is_differentiable_twice(softcap: float | None, bias: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7, 3), (7,)][: 3 if bias else 2]
    inputs = [torch.randn(s, generator=draws, dtype=torch.float64, requires_grad=True) for s in shapes]
    state, action = torch.tensor([0, 1, 1, 3, 4]), torch.tensor([2, 0, 6, 6, 1])
    options = HeadOptions(scale=0.7, softcap=softcap, chunk=2, entropy=True)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Any]:
        found = evaluate_head(hidden, weight, bias, state, action, options)
        return found.logp, found.entropy

    assert torch.autograd.gradcheck(head, inputs)
    assert torch.autograd.gradgradcheck(head, inputs)


def test_the_norm_is_differentiable_twice() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda h, w: rms_norm(h, w, 1e-5), (hidden, weight))


def rollout(dtype: str) -> tuple[LanguageActor, Batch]:
    config = LanguageConfig(model="tiny:1x32", max_new_tokens=4, micro_batch_tokens=64, dtype=dtype)  # type: ignore[arg-type]
    with task_from_spec("builtin:largest", count=2, digits=1, shots=1, heldout_size=4) as task:
        actor = LanguageActor.build(config, stop=task.stop, critic=False)
        plan = Plan(torch.arange(3), torch.full((3,), 2))
        return actor, actor.rollout(task, plan, torch.Generator().manual_seed(0)).batch


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-4), ("float32", 2e-2)])
def test_a_models_hessian_product_is_the_difference_of_its_gradients(dtype: str, tolerance: float) -> None:
    actor, batch = rollout(dtype)
    parameters = [p for p in actor.module.parameters() if p.requires_grad]
    draws = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in parameters]
    weights = torch.randn(batch.mask.shape, generator=draws, dtype=torch.float64).to(batch.old_logp)

    def evaluate() -> Evaluation:
        return actor.evaluate(batch, frozenset({"logp"})).where(batch.mask)

    def gradient(shift: float) -> tuple[Tensor, Tensor]:
        """Of sum_it c_it logp_it, and each trajectory's log-probability, at displaced parameters."""
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p += shift * v
        logp = evaluate().logp
        found = flat(
            torch.autograd.grad((weights * logp).sum(), parameters, materialize_grads=True, allow_unused=True)
        )
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        return found, logp.detach().sum(-1).double()

    step = 1e-4 if dtype == "float64" else 3e-3
    (up, above), (down, below) = gradient(step), gradient(-step)
    score = ((above - below) / (2 * step)).to(weights)
    outer = torch.autograd.grad(
        (weights * score[:, None] * evaluate().logp).sum(),
        parameters,
        materialize_grads=True,
        allow_unused=True,
    )
    expected = (up - down) / (2 * step) + flat(outer)
    found = flat(evaluation_product(evaluate(), {"logp": weights}, batch.mask, parameters, direction))
    assert (found - expected).norm() < tolerance * expected.norm()
