import pytest
import torch
from torch import nn

from polopt.engine import gradient_block
from polopt.engine.gradient_block import gradients_in_one_block


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(gradient_block, "SMALLEST", 1)


def gradients(module):
    return [p.grad for p in module.parameters()]


def test_sums_of_backward_passes_are_the_same_and_lie_in_one_block(always):
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    for x in inputs:
        module(x).sum().backward()
    expected = [p.grad for p in module.parameters()]
    module.zero_grad()
    with gradients_in_one_block(module):
        for x in inputs:
            module(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(module), expected, strict=True))
    assert len({grad.untyped_storage().data_ptr() for grad in gradients(module)}) == 1


def test_what_had_a_gradient_keeps_it_and_what_gets_none_has_none(always):
    module = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    first, second, third = module.parameters()
    held = first.grad = torch.ones(2, 2)
    with gradients_in_one_block(module):
        (first.sum() + second.sum()).backward()
    assert first.grad is held and torch.equal(held, torch.full((2, 2), 2.0))
    assert torch.equal(second.grad, torch.ones(2, 2)) and third.grad is None


def test_the_next_pass_moves_nothing_into_an_earlier_block(always):
    module = nn.Linear(2, 2, bias=False)
    kept = []
    for factor in (1.0, 2.0):
        module.zero_grad()
        with gradients_in_one_block(module):
            (factor * module.weight).sum().backward()
        kept.append(module.weight.grad)
    assert [float(k[0, 0]) for k in kept] == [1.0, 2.0]
    (3 * module.weight).sum().backward()
    assert float(module.weight.grad[0, 0]) == 5.0
