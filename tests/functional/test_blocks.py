"""Tensors side by side, and which tensors are a whole block."""

import torch
from torch import nn

from polopt.functional.blocks import block_of, side_by_side

SHAPES = [(3,), (2, 4), (), (5, 1, 2)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]


def test_tensors_side_by_side_are_a_block_that_holds_what_they_do() -> None:
    made = side_by_side(parameters())
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    block = block_of(made)
    assert block is not None
    assert torch.equal(block, torch.cat([t.flatten() for t in made]))
    block.mul_(2)
    assert [float(t.unique()) for t in made] == [0.0, 2.0, 4.0, 6.0]


def test_a_part_of_a_block_and_tensors_of_their_own_are_none() -> None:
    made = side_by_side(parameters())
    assert block_of(made[1:]) is None
    assert block_of([*made[:-1], torch.zeros(made[-1].shape)]) is None
    assert block_of([torch.zeros(2), torch.zeros(3)]) is None
