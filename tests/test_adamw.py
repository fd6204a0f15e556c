"""The optimizer of small networks takes torch's steps, and keeps torch's state."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from polopt.adamw import AdamW

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def parameters(dtypes: tuple[torch.dtype, ...]) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=draws).to(dtype)) for dtype in dtypes]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float64, torch.float32)])
def test_steps_and_state_are_torchs_bit_for_bit_whichever_parameters_have_a_gradient(
    dtypes: tuple[torch.dtype, ...],
) -> None:
    mine, theirs = parameters(dtypes), parameters(dtypes)
    one, other = AdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    draws = torch.Generator().manual_seed(1)
    for number in range(12):
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(3, 2, generator=draws).to(a.dtype)
            absent = index == 1 and number in (0, 4, 5)
            a.grad, b.grad = (None, None) if absent else (gradient, gradient.clone())
        if number == 7:
            one.load_state_dict(deepcopy(one.state_dict()))
        for optimizer in (one, other):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states(one), states(other), strict=True))


def test_moments_lie_side_by_side() -> None:
    trained = parameters((torch.float32,) * 3)
    optimizer = AdamW(trained, **OPTIONS)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [optimizer.state[parameter][name] for parameter in trained]
        assert len({moment.untyped_storage().data_ptr() for moment in moments}) == 1
        assert [moment.storage_offset() for moment in moments] == [0, 6, 12]
