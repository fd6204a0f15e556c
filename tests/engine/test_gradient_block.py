from contextlib import nullcontext

import pytest
import torch
from torch import nn

from polopt.engine import gradient_block
from polopt.engine.gradient_block import gradient_to_add_to, gradients_in_one_block


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


class Doubled(torch.autograd.Function):
    """Twice the sum of a parameter, which adds to the parameter's gradient by itself."""

    @staticmethod
    def forward(ctx, parameter):
        ctx.save_for_backward(parameter)
        return 2 * parameter.sum()

    @staticmethod
    def backward(ctx, grad):
        into, returned = gradient_to_add_to(*ctx.saved_tensors)
        into += 2 * grad
        return returned


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("first", ["direct", "returned"])
def test_a_gradient_that_is_added_directly_joins_one_that_is_returned(always, inside, first):
    module = nn.Linear(2, 2, bias=False)
    direct, returned = Doubled.apply(module.weight), module.weight.sum()
    losses = [direct, returned] if first == "direct" else [returned, direct]
    with gradients_in_one_block(module) if inside else nullcontext():
        for _ in range(2):
            for loss in losses:
                loss.backward(retain_graph=True)
        (direct + returned).backward()
    assert torch.equal(module.weight.grad, torch.full((2, 2), 9.0))
    held = gradient_to_add_to(module.weight)[0]
    assert held is not module.weight.grad and not held.any()


def test_only_the_open_blocks_own_parameters_take_gradients_directly(always):
    module, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with gradients_in_one_block(module):
        assert gradient_to_add_to(module.weight)[1] is None
        into, returned = gradient_to_add_to(other.weight)
    assert into is returned and other.weight.grad is None
    assert module.weight.grad is not None
