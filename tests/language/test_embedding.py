import pytest
import torch
from torch import nn

from polopt.engine import gradient_block
from polopt.engine.gradient_block import gradients_in_one_block
from polopt.language.embedding import direct_embeddings, embedding

TOKENS = torch.tensor([[0, 3, 3], [1, 0, 2]])


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("direct", [False, True])
def test_rows_and_gradients_are_those_of_torch(monkeypatch, padding, direct):
    monkeypatch.setattr(gradient_block, "SMALLEST", 1 if direct else 2**24)
    torch.manual_seed(0)
    module, factors = nn.Embedding(5, 4, padding_idx=padding), torch.randn(2, 3, 4)
    expected = torch.autograd.grad((module(TOKENS) * factors).sum(), module.weight)[0]
    with direct_embeddings(module), gradients_in_one_block(module):
        for _ in range(2):
            out = module(TOKENS)
            (out * factors).sum().backward()
    assert torch.equal(out, module(TOKENS))
    torch.testing.assert_close(module.weight.grad, 2 * expected)


def test_derivatives_of_both_orders_are_those_of_finite_differences():
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: embedding(TOKENS, w), (weight,))
    assert torch.autograd.gradgradcheck(lambda w: embedding(TOKENS, w).square(), (weight,))


def test_embeddings_that_do_more_are_left_alone():
    plain, bounded = nn.Embedding(5, 4), nn.Embedding(5, 4, max_norm=1.0)
    with direct_embeddings(nn.ModuleList([plain, bounded])):
        assert "forward" in vars(plain) and "forward" not in vars(bounded)
    assert "forward" not in vars(plain)
