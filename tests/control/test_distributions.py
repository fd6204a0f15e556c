"""Distributions over actions against torch's own, and the laws of squashing and divergence."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as reference
from torch.distributions import kl_divergence

from polopt.control.distributions import distribution_of
from polopt.errors import ConfigError

LOW, HIGH = np.array([-1.0, -2.0], dtype=np.float32), np.array([1.0, 3.0], dtype=np.float32)
BOX = spaces.Box(LOW, HIGH)


def outputs(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(50, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_categorical_agrees_with_torch() -> None:
    made = distribution_of(spaces.Discrete(5), "auto")
    new, old = outputs(5), outputs(5, 1)
    action = torch.arange(50)[:, None] % 5
    torch.testing.assert_close(
        made.logp(new, action), reference.Categorical(logits=new).log_prob(action[:, 0])
    )
    torch.testing.assert_close(made.entropy(new), reference.Categorical(logits=new).entropy())
    expected = kl_divergence(reference.Categorical(logits=new), reference.Categorical(logits=old))
    torch.testing.assert_close(made.kl(new, old), expected)


def test_choices_of_a_multi_discrete_action_are_independent() -> None:
    made = distribution_of(spaces.MultiDiscrete([2, 3]), "auto")
    new, old, action = outputs(5), outputs(5, 1), torch.stack([torch.arange(50) % 2, torch.arange(50) % 3], 1)
    parts = [distribution_of(spaces.Discrete(n), "auto") for n in (2, 3)]
    for name, arguments in (("logp", (action,)), ("entropy", ()), ("kl", (old,))):
        split = [
            getattr(part, name)(*(x[:, s] if x.shape[1] == 5 else x[:, i : i + 1] for x in (new, *arguments)))
            for i, (part, s) in enumerate(zip(parts, (slice(2), slice(2, 5)), strict=True))
        ]
        torch.testing.assert_close(getattr(made, name)(new, *arguments), sum(split))


def test_gaussian_agrees_with_torch() -> None:
    made = distribution_of(BOX, "gaussian")
    new, old, action = outputs(4), outputs(4, 1), outputs(2, 2)
    mine, other = (reference.Normal(o[:, :2], o[:, 2:].exp()) for o in (new, old))
    torch.testing.assert_close(made.logp(new, action), mine.log_prob(action).sum(-1))
    torch.testing.assert_close(made.entropy(new), mine.entropy().sum(-1))
    torch.testing.assert_close(made.kl(new, old), kl_divergence(mine, other).sum(-1))


def test_squashed_density_is_that_of_the_transformed_gaussian() -> None:
    made = distribution_of(BOX, "squashed")
    new, action = outputs(4), outputs(2, 2)
    scale, middle = torch.tensor((HIGH - LOW) / 2).double(), torch.tensor((HIGH + LOW) / 2).double()
    transforms = [reference.TanhTransform(), reference.AffineTransform(middle, scale)]
    expected = reference.TransformedDistribution(
        reference.Normal(new[:, :2], new[:, 2:].exp()), transforms
    ).log_prob(middle + scale * action.tanh())
    torch.testing.assert_close(made.logp(new, action), expected.sum(-1))
    sent = made.to_environment(100 * action.numpy())
    assert (sent >= LOW).all() and (sent <= HIGH).all()


def test_squashing_keeps_the_divergence() -> None:
    new, old = outputs(4), outputs(4, 1)
    plain, squashed = (distribution_of(BOX, kind) for kind in ("gaussian", "squashed"))
    torch.testing.assert_close(plain.kl(new, old), squashed.kl(new, old))


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_draws_follow_the_probabilities(space: spaces.Space) -> None:
    made = distribution_of(space, "auto")
    logits = outputs(made.outputs)[:1].expand(40_000, -1)
    noise = torch.from_numpy(made.noise((40_000,), np.random.default_rng(0)))
    drawn = made.draw(logits, noise)
    entropy = -made.logp(logits, drawn).mean()
    assert math.isclose(float(entropy), float(made.entropy(logits)[0]), abs_tol=0.03)
    assert space.contains(np.asarray(made.to_environment(drawn[:1].numpy()))[0])


def test_unbounded_actions_cannot_be_squashed() -> None:
    with pytest.raises(ConfigError, match="unbounded"):
        distribution_of(spaces.Box(-np.inf, np.inf, (2,)), "squashed")


def test_a_discrete_space_takes_no_gaussian() -> None:
    with pytest.raises(ConfigError, match="discrete"):
        distribution_of(spaces.Discrete(3), "gaussian")
