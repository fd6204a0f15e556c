r"""Occupancy ORPO - Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking (arXiv 2403.03185, 2024).

A proxy reward is worth something because it correlates with the true reward on what a reference policy does; it is hacked
when optimising it breaks that correlation. The true return is bounded from below by the proxy's less the root of the
chi^2 divergence between the two policies' **occupancy measures** (how often each state and action is visited), not
between their action distributions. Occupancy-regularised policy optimization ascends that bound: a discriminator between
current and reference steps learns the log occupancy ratio, and its exponential is taken off the reward. Not the
odds-ratio method of the same name.

With :math:`J(\pi,R)=\sum\mu_\pi R`, standard deviations and the correlation r taken under :math:`\mu_{ref}`:

.. math::
    \frac{J(\pi,R)-J(\pi_{ref},R)}{\sigma_R}\ge\frac1r\Big[\frac{J(\pi,\tilde R)-J(\pi_{ref},\tilde R)}{\sigma_{\tilde R}}
    -\sqrt{(1-r^2)\,\chi^2(\mu_\pi\|\mu_{ref})}\Big] \tag{3}

.. math::
    \max_\pi J(\pi,\tilde R)-\lambda\sqrt{\chi^2(\mu_\pi\|\mu_{ref})}, \quad
    \lambda=\sigma_{\tilde R}\sqrt{1-r^2} \tag{4}

.. math::
    \min_d\ \mathbb E_{\mu_\pi}\log(1+e^{-d})+\mathbb E_{\mu_{ref}}\log(1+e^{d}), \quad
    d^*=\log(\mu_\pi/\mu_{ref}) \tag{5}

.. math::
    R'=\tilde R+\mathrm{clip}\big(-\lambda\,z/\sqrt{\bar z}, -c, c\big), \quad z=e^{d}-1,\ \bar z\ \text{its trimmed mean}
    \tag{7}

Other divergences (8): chi2 z, kl d, tv sign(d) with a tanh loss, wasserstein d with clipped weights. The baselines pay for
action distributions instead (9):

.. math::
    \frac{\lambda}{1-\gamma}\,\mathrm{mean}_s D(s), \quad
    D=\mathrm{KL},\ \chi^2\ \text{or}\ \sqrt{\max(\chi^2,10^{-4})} \tag{9}

A response of a language model is one decision, so its log-ratio is known without a discriminator; E is exp with a linear
continuation above 10 nats:

.. math::
    \rho_i=\sum_t m_{it}(\log\pi-\log\pi_{ref})_{it}, \quad
    \widehat{\chi^2}=\mathrm{mean}_i[E(\rho_i)+E(-\rho_i)-2], \quad
    L=w\sqrt{\max(\widehat{\chi^2},10^{-4})} \tag{10}

The gradient of (10) is half that of chi^2 plus that of KL(ref || pi), as in the official code, because the samples are not
differentiated; the shaping part has the exact gradient, a reward of :math:`-wE(\rho_i)/\sqrt{\widehat{\chi^2}}`.

RECONSTRUCTED: reference steps are kept from a file or from the first iteration, whose policy is the reference, where the
paper collects new ones every iteration; a trim of less than one step is none (the official slice is empty then and
silently turns the penalty off); per-decision baselines estimate (9) from the decisions taken, weighted by the ratio to
the behaviour policy, and take the root over the batch instead of per state.

Slots: shaping `occupancy` (5) to (8), `sequence_chi2`; regularizers `sequence_chi2` (10), `action_divergence` and
`action_sqrt_chi2` (9). The functions for tables, (1) to (4), say when a proxy is safe at all.

Use it when the reward is a proxy and some policy that is known to be sane can be run; not when no such policy exists, or
when it never visits what you want to reach: there the divergence is infinite.

Pitfalls: the divergence is that of what `features` describes, states alone by default; the discriminator's samples are
not discounted, while (4) is; standardised advantages hide the size of the coefficient from all but the critic; the first
iteration of `occupancy` without a file is not penalised.
"""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.functional.masked import masked_mean, zero_outside
from polopt.functional.ratio import log_ratio
from polopt.functional.returns import outcome_at_last
from polopt.method import Method
from polopt.methods.classics.entropy import EntropyBonus
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import GAE, PPOClip, ValueLoss
from polopt.methods.preference.orpo_discriminator import (
    Discriminator,
    Divergence,
    initial_weights,
    occupancy_penalty,
    perceptron,
    perceptron_shapes,
    train_discriminator,
)
from polopt.methods.preference.orpo_divergences import (
    FLOOR,
    SampledDivergence,
    exp_linear,
    sampled_penalty,
    sequence_divergence,
    sequence_log_ratio,
)
from polopt.parts import Draw, Regularizer, Shaping
from polopt.registry import register, register_recipe
from polopt.settings import Settings


@register("occupancy")
class OccupancyPenalty(Shaping):
    """A discriminator's penalty on steps that the reference policy would rarely take, equations (5) to (8)."""

    reconstructed = "reference steps are kept, not collected anew every iteration"
    grows = ("weights", "mean", "square", "reference")
    weights: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    reference: Tensor
    reward_std: Tensor

    class Config(Settings):
        """Options of the penalty and of the discriminator."""

        kind: Divergence = "sqrt_chi2"
        """Divergence between the occupancy measures."""
        coef: float = Field(0.1, ge=0)
        """Lambda: reward units per unit of divergence, times the proxy's deviation if `scale_free`; 0.01 to 1."""
        scale_free: bool = True
        """Multiply `coef` by the standard deviation of the proxy reward per step under the reference."""
        reward_clip: float = Field(1000.0, gt=0)
        """Largest penalty of a step in reward units (paper: 1 to 1e10 by environment)."""
        trim_fraction: float = Field(0.01, ge=0, lt=0.5)
        """Share of the steps dropped at either end before the mean under the root."""
        features: str = "ref_features"
        """Batch field or signal [N, T, F] that describes each step: `ref_features`, what the reference's last layer sees
        of the state, or one with the action in it."""
        reference: str | None = None
        """File in the safetensors format with a batch of the reference's rollouts (`Batch.to_tensors`); if not given, the
        first iteration's steps, whose policy is the reference."""
        capacity: int = Field(20_000, ge=1)
        """Reference steps that are kept."""
        width: int = Field(256, ge=1)
        """Units of a hidden layer."""
        layers: int = Field(2, ge=0)
        """Hidden layers."""
        epochs: int = Field(8, ge=0)
        """Passes over the current steps before the discriminator is used; as many as the policy's."""
        minibatch: int = Field(128, ge=1)
        """Current steps of a discriminator update, against as many reference steps."""
        lr: float = Field(1e-3, gt=0)
        """Adam's step size."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.requires = frozenset({self.config.features})
        for name in ("weights", "mean", "square"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("reference", torch.zeros(0, 0))
        self.register_buffer("reward_std", torch.zeros((), dtype=torch.float64))
        self._next: dict[str, Tensor] = {}

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        self._next = {}
        current = self._features(batch)
        if not len(current):
            return batch
        generator = draw("occupancy")
        reference, reward_std = self._reference(batch, generator)
        self._next = {"reference": reference, "reward_std": reward_std}
        if not len(self.reference) and self.config.reference is None:
            return self._with_penalty(batch, torch.zeros(batch.mask.shape, dtype=torch.float64))
        if reference.shape[1] != current.shape[1]:
            raise ConfigError(
                f"shaping occupancy: reference steps have {reference.shape[1]} features of {self.config.features!r}, "
                f"current ones {current.shape[1]}; record both with the same policy"
            )
        scores = self._scores(current, reference, generator)
        penalty = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
        penalty[batch.mask] = self._penalty(scores, reward_std)
        return self._with_penalty(batch, penalty)

    def _with_penalty(self, batch: Batch, penalty: Float[Tensor, "N T"]) -> Batch:
        earned = 0.0 if batch.step_rewards is None else zero_outside(batch.step_rewards, batch.mask)
        batch = batch.clone(recurse=False)
        batch.step_rewards = (earned + penalty.to(batch.mask.device)).to(batch.old_logp)
        return batch

    def observe(self, batch: Batch) -> None:
        # what the iteration learned becomes state here, so that preparing a batch twice is safe
        for name, value in self._next.items():
            setattr(self, name, value)
        self._next = {}

    def _scores(self, current: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
        """Log occupancy ratio of each current step, by a discriminator trained on them first."""
        c = self.config
        shapes = perceptron_shapes(current.shape[1], c.width, c.layers)
        weights, mean, square = (buffer.to(current) for buffer in (self.weights, self.mean, self.square))
        start = Discriminator(weights, mean, square, self.steps)
        if not len(self.weights):
            weights = initial_weights(shapes, generator).to(current)
            start = Discriminator(weights, torch.zeros_like(weights), torch.zeros_like(weights), self.steps)
        trained = train_discriminator(
            start, current, reference, shapes, generator,
            kind=c.kind, epochs=c.epochs, minibatch=c.minibatch, lr=c.lr,
        )  # fmt: skip
        self._next |= trained._asdict()
        return perceptron(trained.weights, current, shapes)

    def _penalty(self, scores: Tensor, reward_std: Tensor) -> Tensor:
        c = self.config
        coef = c.coef * reward_std if c.scale_free else c.coef
        return occupancy_penalty(scores.double(), c.kind, coef, c.reward_clip, c.trim_fraction)

    def _reference(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Kept reference steps [m, F] and the standard deviation of their rewards."""
        if len(self.reference):
            device = batch.old_logp.device
            return self.reference.to(device), self.reward_std.to(device)
        recorded = batch if self.config.reference is None else self._recorded()
        features, rewards = self._features(recorded), _rewards_per_step(recorded)
        if not len(features):
            raise ConfigError(f"shaping occupancy.reference = {self.config.reference!r}: has no decisions")
        kept = torch.randperm(len(features), generator=generator)[: self.config.capacity].sort().values
        std = (rewards - masked_mean(rewards, recorded.mask))[recorded.mask].square().mean().sqrt()
        return features[kept].to(batch.old_logp.device), std.to(batch.old_logp.device)

    def _recorded(self) -> Batch:
        from safetensors.torch import load_file

        path = Path(self.config.reference)
        if not path.is_file():
            raise ConfigError(
                f"shaping occupancy.reference = {str(path)!r}: no such file; record a rollout there"
            )
        return Batch.from_tensors(load_file(path))

    def _features(self, batch: Batch) -> Float[Tensor, "n F"]:
        name = self.config.features
        found = getattr(batch, name, None)
        found = batch.signal(name) if found is None else found
        return cast(Tensor, found).detach()[batch.mask].float()


def _rewards_per_step(batch: Batch) -> Float[Tensor, "N T"]:
    """Everything each decision earned, the trajectory's own reward at the last one; float64."""
    rewards = outcome_at_last(batch.rewards.detach().double().nan_to_num(0.0, 0.0, 0.0).sum(-1), batch.mask)
    if batch.step_rewards is None:
        return rewards
    return rewards + zero_outside(batch.step_rewards.detach().double(), batch.mask)


class SequenceOptions(Settings):
    """Options of the divergence between whole responses."""

    kind: SampledDivergence = "sqrt_chi2"
    """The root of chi^2, chi^2 itself, or the KL."""
    log_ratio_clip: float = Field(10.0, gt=0)
    """Log-ratio of a response in nats from which on its exponential grows linearly."""
    chi2_floor: float = Field(FLOOR, gt=0)
    """Smallest chi^2 that the root is taken of; there is no gradient below."""


@register("sequence_chi2")
class SequenceChi2(Regularizer):
    """Divergence from the reference over whole responses, equation (10), with the official gradient."""

    separable = False
    requires = frozenset({"ref_logp"})

    class Config(SequenceOptions, Regularizer.Config):
        """Options of the divergence."""

        coef: float = Field(0.0008, ge=0)
        """w: weight of the divergence in the loss (paper: 0.0008)."""

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        c = self.config
        mask = batch.mask & (batch.weights > 0)
        shares = (batch.weights.double() * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        found = sequence_divergence(evaluation.logp, batch.ref_logp, mask, c.log_ratio_clip, shares)
        return c.coef * sampled_penalty(found.kl, found.chi2, c.kind, c.chi2_floor).to(evaluation.logp.dtype)


@register("sequence_chi2")
class SequenceChi2Reward(Shaping):
    """The same divergence taken off the reward at the last decision, which has its exact gradient on fresh samples."""

    requires = frozenset({"ref_logp"})

    class Config(SequenceOptions):
        """Options of the divergence."""

        coef: float = Field(0.0008, ge=0)
        """w: reward units per unit of the divergence."""

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        c = self.config
        rho = sequence_log_ratio(batch.old_logp, batch.ref_logp, batch.mask)
        decided = batch.mask.any(-1).double()
        found = sequence_divergence(batch.old_logp, batch.ref_logp, batch.mask, c.log_ratio_clip, decided)
        gradient = {
            "kl": rho,
            "chi2": 2 * exp_linear(rho, c.log_ratio_clip),
            "sqrt_chi2": exp_linear(rho, c.log_ratio_clip) / found.chi2.clamp(min=c.chi2_floor).sqrt(),
        }
        cost = outcome_at_last(gradient[c.kind], batch.mask)
        earned = 0.0 if batch.step_rewards is None else zero_outside(batch.step_rewards, batch.mask)
        batch = batch.clone(recurse=False)
        batch.step_rewards = (earned - c.coef * cost).to(batch.old_logp)
        return batch


class ActionOptions(Regularizer.Config):
    """Options of the divergence between action distributions."""

    coef: float = Field(0.01, ge=0)
    """Lambda: reward units per unit of divergence."""
    gamma: float = Field(0.99, ge=0, lt=1)
    """Discount; the penalty is divided by 1 - gamma."""
    log_ratio_clip: float = Field(10.0, gt=0)
    """Log-ratio of a decision in nats from which on its exponential grows linearly."""


@register("action_divergence")
class ActionDivergence(Regularizer):
    """Divergence from the reference at the states visited, equation (9), estimated from the decisions taken."""

    reconstructed = "equation (9) is estimated from the decisions taken"
    requires = frozenset({"ref_logp"})

    class Config(ActionOptions):
        """Options of the divergence."""

        kind: Literal["kl", "chi2"] = "kl"
        """KL, or chi^2."""

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        c = self.config
        return sampled_action_divergence(evaluation, batch, c.kind, c.log_ratio_clip) / (1 - c.gamma)


@register("action_sqrt_chi2")
class ActionSqrtChi2(Regularizer):
    """Root of the mean chi^2 from the reference at the states visited, equation (9)."""

    reconstructed = "the root is taken of the batch's mean, not of each state's chi^2"
    separable = False
    requires = frozenset({"ref_logp"})

    class Config(ActionOptions):
        """Options of the divergence."""

        chi2_floor: float = Field(FLOOR, gt=0)
        """Smallest chi^2 that the root is taken of; there is no gradient below."""

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        c = self.config
        terms = sampled_action_divergence(evaluation, batch, "chi2", c.log_ratio_clip)
        weights = batch.weights.to(terms)
        chi2 = (weights * terms).sum() / zero_outside(weights, batch.mask).sum().clamp(min=1e-30)
        return c.coef / (1 - c.gamma) * chi2.clamp(min=c.chi2_floor).sqrt()


def sampled_action_divergence(
    evaluation: Evaluation, batch: Batch, kind: Literal["kl", "chi2"], bound: float = 10.0
) -> Float[Tensor, "N T"]:
    r"""Estimate of each decision's KL or chi^2 from the reference, >= 0, unbiased in value and gradient within `bound`.

    With :math:`x=\log\pi-\log\pi_{ref}` and w the ratio to the behaviour policy: :math:`w(x+e^{-x}-1)` for the KL,
    :math:`w(e^x+e^{-x}-2)` for chi^2.
    """
    ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
    x = zero_outside(evaluation.logp, batch.mask) - zero_outside(batch.ref_logp.detach(), batch.mask)
    down = exp_linear(-x, bound)
    return ratio * (x + down - 1 if kind == "kl" else exp_linear(x, bound) + down - 2)


@register_recipe("orpo-chi2")
def orpo_chi2() -> Method:
    """GRPO with the root of the responses' chi^2 from the reference: the form for language models."""
    return Method(
        advantage=GroupStandardized(),
        surrogate=PPOClip(),
        regularizers=[SequenceChi2()],
        defaults={"minibatches": 4},
    )


@register_recipe("orpo-chi2", domain="control")
def orpo_chi2_control() -> Method:
    """PPO on a proxy reward less the occupancy penalty: the tomato world's constants, without its adaptive KL."""
    return Method(
        shaping=[OccupancyPenalty(features="state_action")],
        advantage=GAE(gamma=0.99, gae_lambda=0.98),
        surrogate=PPOClip(clip_low=0.05, clip_high=0.05),
        regularizers=[ValueLoss(coef=0.01), EntropyBonus(coef=0.01)],
        defaults={"prompts": 12, "rollouts": 1, "epochs": 8, "minibatches": 24, "max_grad_norm": 0.1},
    )
