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

Slots: shaping `occupancy` (5) to (8), in `orpo_occupancy`, and `sequence_chi2`; regularizers `sequence_chi2` (10),
`action_divergence` and `action_sqrt_chi2` (9). The functions for tables, (1) to (4), say when a proxy is safe at all.

Use it when the reward is a proxy and some policy that is known to be sane can be run; not when no such policy exists, or
when it never visits what you want to reach: there the divergence is infinite.

Pitfalls: the divergence is that of what `features` describes, states alone by default; the discriminator's samples are
not discounted, while (4) is; standardised advantages hide the size of the coefficient from all but the critic; the first
iteration of `occupancy` without a file is not penalised.
"""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import zero_outside
from polopt.functional.ratio import log_ratio
from polopt.functional.returns import outcome_at_last
from polopt.method import Method
from polopt.methods.classics.entropy import EntropyBonus
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import GAE, PPOClip, ValueLoss
from polopt.methods.preference.orpo_divergences import (
    FLOOR,
    SampledDivergence,
    exp_linear,
    sampled_penalty,
    sequence_divergence,
    sequence_log_ratio,
)
from polopt.methods.preference.orpo_occupancy import OccupancyPenalty
from polopt.parts import Draw, Regularizer, Shaping
from polopt.registry import register, register_recipe
from polopt.settings import Settings


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
