"""Occupancy ratios by a discriminator, for `orpo_chi2` (arXiv 2403.03185, equations 5 to 8).

The discriminator is a perceptron between current and reference steps whose weights are one vector, so that it and its
optimizer's memory are three tensors of a checkpoint.
"""

from math import prod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import leaky_relu, softplus

Divergence = Literal["sqrt_chi2", "chi2", "kl", "tv", "wasserstein"]
WASSERSTEIN_BOUND = 0.01
"""Weights of the discriminator are clipped to this for the Wasserstein distance."""


def divergence_estimate(
    scores: Float[Tensor, "*n"], kind: Divergence, trim_fraction: float = 0.0
) -> Float[Tensor, ""]:
    """Divergence of the current from the reference occupancy: the mean over the current steps' scores d in nats.

    Args:
        scores: discriminator's logits of current steps.
        kind: chi^2 itself for both `chi2` and `sqrt_chi2`.
        trim_fraction: share of the steps that is dropped at either end before the mean, rounded down.
    """
    terms = _distance(scores, kind).flatten().sort().values
    dropped = int(trim_fraction * len(terms))
    return terms[dropped : len(terms) - dropped].mean()


def occupancy_penalty(
    scores: Float[Tensor, "*n"],
    kind: Divergence,
    coef: float | Tensor,
    reward_clip: float,
    trim_fraction: float = 0.01,
) -> Float[Tensor, "*n"]:
    """Equations (7) and (8): what each step is paid for where the current policy goes more often than the reference.

    Args:
        scores: discriminator's logits of current steps.
        kind: divergence that is held down.
        coef: reward units per unit of the divergence (of its root for `sqrt_chi2`).
        reward_clip: bound on the result's size in reward units.
        trim_fraction: share of the steps dropped at either end before the mean under the root.
    """
    distance = _distance(scores, kind)
    if kind == "sqrt_chi2":
        chi2 = divergence_estimate(scores, kind, trim_fraction)
        distance = torch.where(chi2 > 0, distance / chi2.clamp(min=0).sqrt(), distance)
    distance = torch.where(distance.isfinite(), distance, 0.0)
    return (-coef * distance).clamp(-reward_clip, reward_clip)


def _distance(scores: Tensor, kind: Divergence) -> Tensor:
    match kind:
        case "sqrt_chi2" | "chi2":
            return torch.expm1(scores)
        case "kl" | "wasserstein":
            return scores
        case "tv":
            return scores.sign()


def discriminator_loss(
    current: Float[Tensor, "*n"], reference: Float[Tensor, "*m"], kind: Divergence = "sqrt_chi2"
) -> Float[Tensor, ""]:
    """Equations (5) and (8), to be minimised: scores of current steps up, of reference steps down. Means, unweighted."""
    match kind:
        case "sqrt_chi2" | "chi2" | "kl":
            return softplus(-current).mean() + softplus(reference).mean()
        case "tv":
            size = current.square().mean() + reference.square().mean()
            return torch.tanh(-current).mean() + torch.tanh(reference).mean() + 0.01 * size
        case "wasserstein":
            return reference.mean() - current.mean()


class Discriminator(NamedTuple):
    """Weights of the perceptron and Adam's memory of them, [W] each, and the steps taken."""

    weights: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor


def perceptron_shapes(inputs: int, width: int, layers: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of each layer."""
    sizes = [inputs, *[width] * layers, 1]
    return [(after, before) for before, after in zip(sizes[:-1], sizes[1:], strict=True)]


def initial_weights(shapes: list[tuple[int, int]], generator: torch.Generator) -> Float[Tensor, " W"]:
    """Weights and biases uniform within 1 / sqrt(inputs), layer by layer."""
    drawn = [
        (2 * torch.rand(rows * (columns + 1), generator=generator) - 1) / columns**0.5
        for rows, columns in shapes
    ]
    return torch.cat(drawn)


def perceptron(
    weights: Float[Tensor, " W"], features: Float[Tensor, "n F"], shapes: list[tuple[int, int]]
) -> Float[Tensor, " n"]:
    """Scores of the features; leaky ReLU between the layers."""
    hidden, layers = features, weights.split([prod(shape) + shape[0] for shape in shapes])
    for number, (layer, (rows, columns)) in enumerate(zip(layers, shapes, strict=True)):
        matrix, bias = layer.split([rows * columns, rows])
        hidden = torch.addmm(bias, leaky_relu(hidden) if number else hidden, matrix.view(rows, columns).T)
    return hidden[:, 0]


def train_discriminator(
    start: Discriminator,
    current: Float[Tensor, "n F"],
    reference: Float[Tensor, "m F"],
    shapes: list[tuple[int, int]],
    generator: torch.Generator,
    *,
    kind: Divergence,
    epochs: int,
    minibatch: int,
    lr: float,
) -> Discriminator:
    """Passes over the current steps, each minibatch against as many reference steps drawn with replacement."""
    weights = start.weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr)
    memory = {"exp_avg": start.mean, "exp_avg_sq": start.square, "step": start.steps}
    optimizer.state[weights] = {name: tensor.clone() for name, tensor in memory.items()}
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(current), generator=generator).split(minibatch):
                others = torch.randint(len(reference), (len(rows),), generator=generator)
                scores = perceptron(weights, torch.cat([current[rows], reference[others]]), shapes)
                loss = discriminator_loss(scores[: len(rows)], scores[len(rows) :], kind)
                (weights.grad,) = torch.autograd.grad(loss, weights)
                optimizer.step()
                if kind == "wasserstein":
                    weights.data.clamp_(-WASSERSTEIN_BOUND, WASSERSTEIN_BOUND)
    found = optimizer.state[weights]
    return Discriminator(weights.detach(), found["exp_avg"], found["exp_avg_sq"], found["step"])
