"""Networks of policy and critics, and the running moments that normalise what they see."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from polopt.control.config import ControlConfig
from polopt.control.distributions import LOG_STD_RANGE, ActionDistribution

Array = np.ndarray
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}
_ON_ARRAYS: dict[type[nn.Module], Callable[[Array], Array]] = {
    nn.Tanh: np.tanh,
    nn.ReLU: lambda x: np.maximum(x, 0),
    nn.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}
"""The activations for arrays."""
_CLIP = 10.0
_POLICY_GAIN = 0.01
"""Gain of the policy's last layer: the first actions hardly depend on the observation."""
POLICY, CRITIC = 0, 1
"""Numbers of their hidden layers."""


class RunningMoments(nn.Module):
    """Mean and variance of everything seen so far, merged batch by batch (Chan et al., 1979).

    Args:
        shape: of one value.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, values: Float[Tensor, "D *shape"]) -> None:
        """See further values; none changes nothing."""
        if not len(values):
            return
        values = values.double()
        mean, variance = values.mean(0), values.var(0, correction=0)
        total = self.count + len(values)
        delta = mean - self.mean
        spread = self.variance * self.count + variance * len(values)
        self.variance.copy_((spread + delta.square() * self.count * len(values) / total) / total)
        self.mean += delta * len(values) / total
        self.count.copy_(total)

    def standardize(self, values: Tensor) -> Tensor:
        """(values - mean) / std, clipped at 10, in the precision of the values."""
        standardized = (values - self.mean) / (self.variance + 1e-8).sqrt()
        return standardized.clamp(-_CLIP, _CLIP).to(values.dtype)

    def standardizing(self) -> Callable[[Array], Array]:
        """The same for arrays, by the present moments."""
        mean, deviation = self.mean.numpy().copy(), np.sqrt(self.variance.numpy() + 1e-8)

        def standardize(values: Array) -> Array:
            return np.minimum(np.maximum((values - mean) / deviation, -_CLIP), _CLIP).astype(values.dtype)

        return standardize

    def scale(self, values: Tensor) -> Tensor:
        """values / std, clipped at 10, in the precision of `values`."""
        return (values / (self.variance + 1e-8).sqrt()).clamp(-_CLIP, _CLIP).to(values.dtype)


class HiddenLayers(nn.Module):
    """Hidden layers of B networks of the same widths, evaluated together as batched products.

    Args:
        networks: the linear layers of each network, in order; their weights are taken over.
        activation: after each layer.
    """

    def __init__(self, networks: list[list[nn.Linear]], activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.count = activation, len(networks)
        for number, same in enumerate(zip(*networks, strict=True)):
            weight, bias = (
                torch.stack([getattr(layer, name) for layer in same]) for name in ("weight", "bias")
            )
            self.register_parameter(f"weight{number}", nn.Parameter(weight))
            self.register_parameter(f"bias{number}", nn.Parameter(bias[:, None]))

    def forward(self, inputs: Float[Tensor, "D F"]) -> Float[Tensor, "B D H"]:
        """Features of all networks, which see the same."""
        hidden = inputs.expand(self.count, *inputs.shape)
        for weight, bias in self._layers():
            hidden = self.activation(torch.baddbmm(bias, hidden, weight.mT))
        return hidden

    def alone(self, number: int) -> Callable[[Tensor], Tensor]:
        """One of the networks, from inputs [D, F] to features [D, H], with the present parameters."""
        layers = self._layers_of(number)

        def features(hidden: Tensor) -> Tensor:
            for weight, bias in layers:
                hidden = self.activation(linear(hidden, weight, bias))
            return hidden

        return features

    def on_arrays(self, number: int) -> Callable[[Array], Array]:
        """The same for arrays."""
        layers = [
            (weight.detach().numpy().T, bias.detach().numpy()) for weight, bias in self._layers_of(number)
        ]
        activation = _ON_ARRAYS[type(self.activation)]

        def features(hidden: Array) -> Array:
            for weight, bias in layers:
                hidden = activation(hidden @ weight + bias)
            return hidden

        return features

    def _layers_of(self, number: int) -> list[tuple[Tensor, Tensor]]:
        return [(weight[number], bias[number, 0]) for weight, bias in self._layers()]

    def _layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        parameters: Iterator[Any] = iter(self._parameters.values())
        return zip(parameters, parameters, strict=True)


class ControlNetworks(nn.Module):
    """A policy and, if asked for, a critic and a median critic, which have layers of their own.

    Images (three-dimensional observations) are seen through one convolutional network that all share.

    Args:
        observation: shape of an observation.
        distribution: of the actions.
        config: widths, nonlinearity, standard deviation, normalisation.
        critics: which of "value" and "median" to have.
    """

    def __init__(
        self,
        observation: tuple[int, ...],
        distribution: ActionDistribution,
        config: ControlConfig,
        critics: frozenset[str],
    ) -> None:
        super().__init__()
        hidden, activation = config.hidden or [64, 64], config.activation or "tanh"
        self.image = len(observation) == 3
        self.convolution = _convolution(observation) if self.image else None
        size = (
            math.prod(observation) if self.convolution is None else _features(self.convolution, observation)
        )
        self.own_std = not distribution.discrete and not config.state_dependent_std
        self.bounded_std = not distribution.discrete and config.state_dependent_std
        width = distribution.outputs // 2 if self.own_std else distribution.outputs
        layers = [_layers(size, hidden)]
        self.policy = _linear(hidden[-1], width, _POLICY_GAIN)
        self.log_std = nn.Parameter(torch.full((width,), config.log_std)) if self.own_std else None
        if self.bounded_std:
            nn.init.constant_(self.policy.bias[width // 2 :], config.log_std)
        if critics:
            layers.append(_layers(size, hidden))
        self.value = _linear(hidden[-1], 1, 1.0) if "value" in critics else None
        self.median = (
            nn.Sequential(
                _linear(hidden[-1], hidden[-1], math.sqrt(2)),
                ACTIVATIONS[activation](),
                _linear(hidden[-1], 1, 1.0),
            )
            if "median" in critics
            else None
        )
        self.hidden = HiddenLayers(layers, ACTIVATIONS[activation]())
        self.observation_moments = RunningMoments(observation) if config.normalize_observations else None
        self.return_moments = RunningMoments(()) if config.normalize_rewards else None
        self.to(getattr(torch, config.dtype))
        for moments in (self.observation_moments, self.return_moments):
            if moments is not None:
                moments.double()

    @torch.no_grad()
    def acting(self) -> Callable[[Tensor], Tensor]:
        """The present policy: from raw observations [D, ...] of any precision to outputs [D, P] for the distribution.

        Without convolutions numpy computes them: for few observations its operations take less time to call than torch's.
        """
        if self.convolution is not None:
            return self._outputs
        moments, features = self.observation_moments, self.hidden.on_arrays(POLICY)
        weight, bias = (tensor.detach().numpy() for tensor in self._last_layer())
        standardize = None if moments is None else moments.standardizing()

        def act(observation: Tensor) -> Tensor:
            seen = observation.numpy()
            seen = (seen if standardize is None else standardize(seen)).astype(weight.dtype)
            return self._within_bounds(torch.from_numpy(features(seen) @ weight.T + bias))

        return act

    def seen(self, observation: Tensor) -> Tensor:
        """What the networks take of a raw observation."""
        moments = self.observation_moments
        return observation if moments is None else moments.standardize(observation)

    def encode(self, observation: Float[Tensor, "D *shape"]) -> Float[Tensor, "D F"]:
        """Input of the layers of policy and critic."""
        if self.convolution is None:
            return observation
        if observation.shape[-1] in (1, 3, 4):
            observation = observation.movedim(-1, -3)
        return self.convolution(observation)

    def distribution_outputs(self, features: Float[Tensor, "D H"]) -> Float[Tensor, "D P"]:
        """Outputs for the action distribution, from the policy's features."""
        return self._within_bounds(linear(features, *self._last_layer()))

    def values(self, features: Float[Tensor, "D H"], which: frozenset[str]) -> dict[str, Float[Tensor, " D"]]:
        """The critics named in `which`, in reward units, from their features."""
        heads: dict[str, Any] = {"value": self.value, "median": self.median}
        return {name: heads[name](features)[:, 0] for name in sorted(which)}

    def _last_layer(self) -> tuple[Float[Tensor, "P H"], Float[Tensor, " P"]]:
        """Weight and bias of the policy's outputs. Standard deviations of their own are biases of rows of zeros."""
        weight, bias = self.policy.weight, self.policy.bias
        if self.log_std is None:
            return weight, bias
        return torch.cat([weight, torch.zeros_like(weight)]), torch.cat([bias, self.log_std])

    def _within_bounds(self, outputs: Tensor) -> Tensor:
        return bounded(outputs) if self.bounded_std else outputs

    def _outputs(self, observation: Tensor) -> Tensor:
        encoded = self.encode(self.seen(observation).to(self.policy.weight.dtype))
        return self.distribution_outputs(self.hidden.alone(POLICY)(encoded))


def bounded(outputs: Tensor) -> Tensor:
    """Outputs for a Gaussian [..., 2 A] with the logarithms of its standard deviations clamped."""
    mean, log_std = outputs.chunk(2, -1)
    return torch.cat([mean, log_std.clamp(*LOG_STD_RANGE)], -1)


def _layers(size: int, hidden: list[int]) -> list[nn.Linear]:
    widths = [size, *hidden]
    return [_linear(before, after, math.sqrt(2)) for before, after in zip(widths, widths[1:], strict=False)]


def _linear(before: int, after: int, gain: float) -> nn.Linear:
    layer = nn.Linear(before, after)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class _Scaled(nn.Module):
    """Pixels in [0, 255] as numbers in [0, 1]."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels / 255.0


def _convolution(observation: tuple[int, ...]) -> nn.Sequential:
    """The network of Mnih et al. (Nature, 2015) for 84 x 84 images; smaller strides for smaller images."""
    channels_last = observation[-1] in (1, 3, 4)
    channels = observation[-1] if channels_last else observation[0]
    smallest = min(observation[:2] if channels_last else observation[1:])
    shapes = [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if smallest >= 36 else [(32, 3, 1), (64, 3, 2)]
    layers: list[nn.Module] = [_Scaled()]
    for width, kernel, stride in shapes:
        layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))  # pyright: ignore[reportArgumentType]
        channels = width
    return nn.Sequential(*layers, nn.Flatten())


def _features(convolution: nn.Module, observation: tuple[int, ...]) -> int:
    example = torch.zeros(1, *observation)
    if observation[-1] in (1, 3, 4):
        example = example.movedim(-1, -3)
    with torch.no_grad():
        return convolution(example).shape[-1]
