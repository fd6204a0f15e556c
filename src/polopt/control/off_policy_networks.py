"""Networks of an off-policy agent: a squashed Gaussian policy, twin critics, and a state value with its target."""

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.control.config import ControlConfig
from polopt.control.distributions import ActionDistribution
from polopt.control.networks import ACTIVATIONS, CRITIC, POLICY, ControlNetworks, HiddenLayers, bounded


def off_policy_config(config: ControlConfig) -> ControlConfig:
    """The configuration with what an off-policy agent has for fields that are left open."""
    filled = config.filled(hidden=[256, 256], activation="relu", horizon=50)
    return filled.model_copy(update={"distribution": "squashed", "state_dependent_std": True})


class TwinCritics(nn.Module):
    """Two networks of state and action, evaluated together.

    Args:
        size: numbers of state and action.
        hidden: units of each hidden layer.
        activation: nonlinearity of the hidden layers.
    """

    def __init__(self, size: int, hidden: list[int], activation: str) -> None:
        super().__init__()
        widths = [size, *hidden, 1]
        self.activation = ACTIVATIONS[activation]()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in zip(widths, widths[1:], strict=False):
            bound = 1 / math.sqrt(before)
            self.weights.append(torch.empty(2, before, after).uniform_(-bound, bound))
            self.biases.append(torch.zeros(2, 1, after))

    def forward(
        self, state: Float[Tensor, "D S"], action: Float[Tensor, "D A"], constant: bool = False
    ) -> Float[Tensor, "D 2"]:
        """Both critics' values; `constant`: no gradient reaches their parameters."""
        found = torch.cat([state, action], -1).expand(2, -1, -1)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if number:
                found = self.activation(found)
            weight, bias = (weight.detach(), bias.detach()) if constant else (weight, bias)
            found = torch.baddbmm(bias, found, weight)
        return found[..., 0].T


class OffPolicyNetworks(ControlNetworks):
    """Policy and state value, twin critics, and what follows them without being trained: see `follow`.

    Args:
        observation: shape of an observation, a vector.
        distribution: of the actions.
        config: widths and nonlinearity.
        critics: {"value"}.
    """

    updates: Tensor

    def __init__(
        self,
        observation: tuple[int, ...],
        distribution: ActionDistribution,
        config: ControlConfig,
        critics: frozenset[str],
    ) -> None:
        super().__init__(observation, distribution, config, critics)
        size = math.prod(observation) + distribution.width
        self.critics = TwinCritics(size, config.hidden or [], config.activation or "").to(
            self.policy.weight.dtype
        )
        self.followers = deepcopy(nn.ModuleList([self.hidden, self.policy, self._value_layer()]))
        self.followers.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def old_outputs(self, state: Float[Tensor, "D S"]) -> Float[Tensor, "D P"]:
        """Outputs of the policy of the last mirror step."""
        hidden, policy, _ = self.followers
        return bounded(policy(_alone(hidden, POLICY)(state)))

    @torch.no_grad()
    def target_value(self, state: Float[Tensor, "D S"]) -> Float[Tensor, " D"]:
        """The target network's value of a state."""
        hidden, _, value = self.followers
        return value(_alone(hidden, CRITIC)(state))[:, 0]

    @torch.no_grad()
    def follow(self, polyak: float, mirror_steps: int) -> None:
        """After an optimizer step: the target moves by the share `polyak`; every `mirror_steps` the old policy is renewed."""
        self.updates += 1
        hidden, policy, value = self.followers
        _move(
            _parameters(hidden, CRITIC, value), _parameters(self.hidden, CRITIC, self._value_layer()), polyak
        )
        if mirror_steps and int(self.updates) % mirror_steps == 0:
            _move(_parameters(hidden, POLICY, policy), _parameters(self.hidden, POLICY, self.policy), 1.0)

    def _value_layer(self) -> nn.Linear:
        assert self.value is not None
        return self.value


def _alone(hidden: nn.Module, number: int) -> Callable[[Tensor], Tensor]:
    assert isinstance(hidden, HiddenLayers)
    return hidden.alone(number)


def _parameters(hidden: nn.Module, number: int, head: nn.Module) -> list[Tensor]:
    """Those of one network: its share of the hidden layers, and its last layer."""
    return [*(parameter[number] for parameter in hidden.parameters()), *head.parameters()]


def _move(followers: list[Tensor], leaders: list[Tensor], share: float) -> None:
    torch._foreach_lerp_(followers, leaders, share)
