"""The policy that acts is the one that learns, whatever computes it."""

import gymnasium as gym
import pytest
import torch

from polopt.control.config import ControlConfig
from polopt.control.distributions import distribution_of
from polopt.control.networks import POLICY, ControlNetworks


def networks(space: gym.Space, shape: tuple[int, ...] = (5,), **options: object) -> ControlNetworks:
    config = ControlConfig.create("control", **{"hidden": [16, 8], **options})
    torch.manual_seed(0)
    made = ControlNetworks(shape, distribution_of(space, config.distribution), config, frozenset({"value"}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


BOX = gym.spaces.Box(-1.0, 1.0, (3,))


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
@pytest.mark.parametrize(
    ("space", "options"),
    [
        (BOX, {}),
        (BOX, {"state_dependent_std": True}),
        (gym.spaces.MultiDiscrete([2, 4]), {"dtype": "float64"}),
        (BOX, {"normalize_observations": True, "dtype": "float64"}),
    ],
    ids=["gaussian", "state-dependent", "discrete", "normalised"],
)
@pytest.mark.parametrize("seen", [torch.float32, torch.float64])
def test_the_outputs_are_those_of_the_learning_policy(
    space: gym.Space, options: dict[str, object], activation: str, seen: torch.dtype
) -> None:
    made = networks(space, activation=activation, **options)
    if made.observation_moments is not None:
        made.observation_moments.update(torch.randn(50, 5) * 3 + 1)
    observation = (torch.randn(4, 5) * 20).to(seen)
    dtype = made.policy.weight.dtype
    with torch.no_grad():
        expected = made.distribution_outputs(made.hidden.alone(POLICY)(made.seen(observation).to(dtype)))
        found = made.acting()(observation)
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_images_are_seen_by_the_convolutions() -> None:
    made = networks(gym.spaces.Discrete(3), (16, 16, 3))
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        encoded = made.encode(images.float())
        expected = made.distribution_outputs(made.hidden.alone(POLICY)(encoded))
        torch.testing.assert_close(made.acting()(images), expected)


def test_moments_standardise_arrays_as_tensors() -> None:
    made = networks(BOX, normalize_observations=True)
    moments = made.observation_moments
    assert moments is not None
    moments.update(torch.randn(50, 5) * 3 + 1)
    values = torch.randn(40, 5) * 50
    assert (moments.standardize(values).abs() == 10).any()
    assert torch.equal(torch.from_numpy(moments.standardizing()(values.numpy())), moments.standardize(values))
