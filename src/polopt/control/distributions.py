r"""Distributions over actions, as functions of the policy network's outputs.

An action is drawn by transforming noise that does not depend on the policy, so that a rollout is reproducible whatever
computes it. Actions are stored as tensors [..., D] before clipping or squashing: log-probabilities of old and new policies
are taken at exactly the same point. Log-probabilities and divergences are in nats, summed over the D dimensions.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from polopt.errors import ConfigError
from polopt.functional.divergence import categorical_kl, gaussian_kl

_NEARLY_ONE = 1 - 1e-6
LOG_STD_RANGE = (-20.0, 2.0)
"""Logarithms of a state-dependent standard deviation are clamped to this range."""


class ActionDistribution(Protocol):
    """What a policy needs of its distribution; `outputs` [..., P] come from the network."""

    outputs: int
    """P: outputs of the network."""
    width: int
    """D: numbers that an action is stored in."""
    discrete: bool
    exact_entropy: bool
    """The entropy has a closed form."""

    def noise(self, shape: tuple[int, ...], draws: Any) -> Any:
        """Noise [*shape, D] from a numpy generator."""
        ...

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Actions [..., D]."""
        ...

    def mode(self, outputs: Tensor) -> Tensor:
        """The likeliest action, before squashing the Gaussian's mean."""
        ...

    def logp(self, outputs: Tensor, action: Tensor) -> Tensor:
        """Log-probability (density for continuous actions)."""
        ...

    def entropy(self, outputs: Tensor) -> Tensor:
        """Exact entropy."""
        ...

    def kl(self, outputs: Tensor, old: Tensor) -> Tensor:
        """KL(new || old)."""
        ...

    def numbers(self, action: Tensor) -> Tensor:
        """Actions [..., D] as numbers that a network takes: choices one-hot."""
        ...

    def to_environment(self, action: Any) -> Any:
        """What the environment takes, from actions [E, D] as a numpy array."""
        ...


class Categorical(ActionDistribution):
    """One or several independent choices: `Discrete` and `MultiDiscrete` actions.

    Args:
        sizes: options of each choice.
        single: the environment takes an integer instead of an array.
        start: the first option's number of each choice.
    """

    discrete = True
    exact_entropy = True

    def __init__(self, sizes: list[int], single: bool, start: Any = 0) -> None:
        self.sizes, self.single, self.start = sizes, single, start
        self.outputs, self.width = sum(sizes), len(sizes)

    def noise(self, shape: tuple[int, ...], draws: Any) -> Any:
        return draws.random((*shape, self.width))

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        if self.width == 1:
            return _drawn(outputs, noise)
        pairs = zip(outputs.split(self.sizes, -1), noise.split(1, -1), strict=True)
        return torch.cat([_drawn(logits, uniform) for logits, uniform in pairs], -1)

    def mode(self, outputs: Tensor) -> Tensor:
        return torch.stack([logits.argmax(-1) for logits in outputs.split(self.sizes, -1)], -1)

    def logp(self, outputs: Tensor, action: Tensor) -> Tensor:
        if self.width == 1:
            return outputs.log_softmax(-1).gather(-1, action)[..., 0]
        parts = zip(outputs.split(self.sizes, -1), action.split(1, -1), strict=True)
        return torch.stack([o.log_softmax(-1).gather(-1, a)[..., 0] for o, a in parts], -1).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        logprobs = [logits.log_softmax(-1) for logits in outputs.split(self.sizes, -1)]
        return torch.stack([-(p.exp() * p).sum(-1) for p in logprobs], -1).sum(-1)

    def kl(self, outputs: Tensor, old: Tensor) -> Tensor:
        pairs = zip(outputs.split(self.sizes, -1), old.split(self.sizes, -1), strict=True)
        return torch.stack([categorical_kl(new, before) for new, before in pairs], -1).sum(-1)

    def numbers(self, action: Tensor) -> Tensor:
        parts = zip(action.unbind(-1), self.sizes, strict=True)
        return torch.cat([one_hot(choice, size) for choice, size in parts], -1)

    def to_environment(self, action: Any) -> Any:
        return action[..., 0] + self.start if self.single else action + self.start


def _drawn(logits: Float[Tensor, "*n A"], uniform: Float[Tensor, "*n 1"]) -> Int[Tensor, "*n 1"]:
    """The choice at which the summed probabilities reach a uniform number."""
    below = logits.softmax(-1).cumsum(-1) < uniform
    return below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)


class Gaussian(ActionDistribution):
    """A diagonal Gaussian, whose draws are clipped to the bounds by the environment's side.

    Args:
        low, high: bounds of the environment's actions, flattened [D].
        shape: of the environment's action.
        dtype: of the environment's action, numpy's.
        state_dependent_std: the network gives logarithms of standard deviations too; otherwise they are parameters of the
            policy, appended to the outputs by the network.
    """

    discrete = False
    exact_entropy = True

    def __init__(self, low: Any, high: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.low, self.high, self.shape, self.dtype = low, high, shape, dtype
        self.width = len(low)
        self.outputs = 2 * self.width

    def noise(self, shape: tuple[int, ...], draws: Any) -> Any:
        return draws.standard_normal((*shape, self.width))

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, -1)
        return torch.addcmul(mean, log_std.exp(), noise)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs[..., : self.width]

    def logp(self, outputs: Tensor, action: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, -1)
        scaled = (action - mean) * (-log_std).exp()
        spread = torch.addcmul(log_std, scaled, scaled, value=0.5)
        return -0.5 * math.log(2 * math.pi) * self.width - spread.sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        return outputs[..., self.width :].sum(-1) + 0.5 * math.log(2 * math.pi * math.e) * self.width

    def kl(self, outputs: Tensor, old: Tensor) -> Tensor:
        return gaussian_kl(*outputs.chunk(2, -1), *old.chunk(2, -1))

    def numbers(self, action: Tensor) -> Tensor:
        return action

    def to_environment(self, action: Any) -> Any:
        clipped = np.minimum(np.maximum(action, self.low), self.high)
        return clipped.reshape(*action.shape[:-1], *self.shape).astype(self.dtype, copy=False)


class SquashedGaussian(Gaussian):
    r"""tanh of a diagonal Gaussian, scaled to the bounds; its divergence is that of the Gaussians before the squashing.

    .. math:: \log\pi(a) = \log N(u) - \sum_d \log(1 - \tanh^2 u_d) - \sum_d \log\tfrac{h_d - l_d}{2}

    Raises:
        ConfigError: the actions are unbounded.
    """

    exact_entropy = False

    def __init__(self, low: Any, high: Any, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(low, high, shape, dtype)
        scale = torch.as_tensor((high - low) / 2, dtype=torch.float64)
        if not bool(torch.isfinite(scale).all()):
            raise ConfigError(
                "control.distribution = 'squashed': the actions are unbounded; choose 'gaussian'"
            )
        self.log_scale = float(scale.log().sum())
        """Logarithm of the volume of the bounds over that of [-1, 1]^D."""

    def logp(self, outputs: Tensor, action: Tensor) -> Tensor:
        return super().logp(outputs, action) - self.log_volume(action)

    def log_volume(self, action: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
        """Logarithm of how much squashing and scaling stretch the space at a point."""
        return (2 * (math.log(2) - action - softplus(-2 * action))).sum(-1) + self.log_scale

    def entropy(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError("a squashed Gaussian's entropy has no closed form")

    def to_environment(self, action: Any) -> Any:
        scaled = self.low + (self.high - self.low) * (np.tanh(action) + 1) / 2
        return super().to_environment(scaled)


class UniformActions(SquashedGaussian):
    """Draws that are uniform within the bounds, whatever the policy."""

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        uniform = torch.erf(noise.double() / math.sqrt(2))
        return uniform.clamp(-_NEARLY_ONE, _NEARLY_ONE).atanh().to(outputs)


class MeanActions(SquashedGaussian):
    """Draws that are always the mode."""

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return self.mode(outputs)


def distribution_of(space: Any, kind: str) -> ActionDistribution:
    """The distribution over a Gymnasium action space.

    Args:
        space: `Discrete`, `MultiDiscrete`, `MultiBinary` or `Box`.
        kind: "auto", "gaussian" or "squashed" for a `Box`.

    Raises:
        ConfigError: another space, or a choice that does not fit it.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        made = SquashedGaussian if kind == "squashed" else Gaussian
        return made(space.low.reshape(-1), space.high.reshape(-1), space.shape, space.dtype)
    if kind != "auto":
        raise ConfigError(f"control.distribution = {kind!r}: the actions are discrete; leave it at 'auto'")
    if isinstance(space, spaces.Discrete):
        return Categorical([int(space.n)], True, int(space.start))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return Categorical([int(n) for n in space.nvec], False, space.start)
    if isinstance(space, spaces.MultiBinary) and isinstance(space.n, int):
        return Categorical([2] * space.n, False)
    raise ConfigError(
        f"task: actions {space} are not supported; allowed: Discrete, MultiDiscrete, MultiBinary, Box"
    )
