"""The shapes in annotations are checked while tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from polopt.functional.ratio import log_ratio
from polopt.methods.classics.grpo import group_standardized


def test_wrong_shapes_are_refused_in_functional_and_methods() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert log_ratio(torch.zeros(2, 3), torch.zeros(2, 3), mask).shape == (2, 3)
    with pytest.raises(TypeCheckError):
        log_ratio(torch.zeros(2, 3), torch.zeros(3, 2), mask)
    with pytest.raises(TypeCheckError):
        group_standardized(torch.zeros(4), torch.zeros(5, dtype=torch.int64))
