r"""MDPO - Mirror Descent Policy Optimization (arXiv 2005.09814, 2020).

Each iteration climbs the linearised return minus a KL divergence to the policy that made the data, by several gradient
steps on that one objective: mirror descent, solved roughly. Nothing is clipped; the divergence alone holds the policy.

.. math::
    \max_\theta\ E_s\Big[E_{a\sim\pi_\theta}A(s,a) - \tfrac1{t_k}\mathrm{KL}(\pi_\theta\|\pi_k)\Big], \quad
    \pi_{k+1}(a|s) \propto \pi_k(a|s)\,e^{t_k A(s,a)} \tag{D1, D2}

.. math::
    L = -\mathrm{mean}(r\hat A) + \tfrac1{t_k}\,\mathrm{mean}_s\,\mathrm{KL}(\pi_\theta\|\pi_k) \tag{D3}

.. math::
    \ell = -r\hat A + \tfrac1{t_k}(r\ln r - r + 1), \quad
    \frac{\partial\ell}{\partial\log\pi} = -r\hat A + \tfrac1{t_k}\,r\ln r \tag{D4}

.. math::
    t_k = \max(t_{min},\ t_0(1 - k/K)) \tag{D6}

.. math::
    L_\pi = \mathrm{mean}\big[\kappa\log\pi_\theta + (\lambda-\kappa)\log\pi_k - Q_1\big] \tag{D7}

.. math::
    \log_q x = \frac{x^{1-q}-1}{1-q}, \quad
    D_q = r(\log_q\pi_\theta - \log_q\pi_k) - (r-1)\,\pi_k^{1-q} \tag{D9}

(D3) needs the whole distribution (`kl="exact"`: control). (D4) works from log-probabilities (`kl="sampled"`: tokens,
denoising steps); it is derived here, and it and its gradient equal (D3) in expectation over the data. Advantages are
standardised (D5), so that a step size of 1 is one standard deviation.

The paper puts log_q in place of the logarithms of the KL. (D9) is the Bregman divergence that this makes on average over
the data: it is 0 with gradient 0 at the old policy and (D4) at q = 1. The official code takes the plain difference of
logarithms of order 2 - q without importance weights: `kl="difference"`.

(D7) is the off-policy loss, at actions that the policy draws anew in replayed states, with the critics of soft actor-critic
(`sac`). kappa = 1 / t weighs the KL and lambda the entropy; with kappa = lambda it is soft actor-critic. pi_k is the policy
of `steps` updates ago at most. Logarithms of another order replace those of the KL: there the official code's 2 - q, at
actions of the new policy, so no weights are needed.

The paper's on-policy critic takes 5 epochs of minibatches of its own, here it descends in the policy's steps.

Use it when several updates per rollout should stay stable without a clip to tune, or as the smooth baseline of a
clipped method. Not when there is one update per rollout: the divergence then has no gradient and the method is the plain
policy gradient.

Pitfalls: as t_k falls, 1/t_k scales the loss and its gradient norm, so keep gradients clipped and `floor` above 0. The
divergence has the new policy first. The form for control has no reward normalisation of its own, and its value loss no
clip (the paper: both).

Slots: surrogate `mdpo`. The recipe has the sampled KL and a group baseline on any domain; its form for control is the
paper's on-policy agent: critic, generalised advantages, exact KL; what other libraries call MDPO. Surrogate `soft_mirror`
(D7) in the recipe `mdpo-off`, the paper's off-policy agent. It collects with draws of the policy, as the paper says; the
published script takes the mean (`control.collect_policy = "deterministic"`).
"""

from typing import Any, Literal, NamedTuple, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import zero_outside
from polopt.functional.ratio import LOG_RATIO_BOUND, log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import GAE, ValueLoss
from polopt.methods.classics.sac import (
    OFF_POLICY_DEFAULTS,
    NoAdvantage,
    SoftCritics,
    SoftSurrogate,
    SquaredOutputs,
)
from polopt.parts import Optimizer, Surrogate
from polopt.registry import register, register_recipe

LOGP_BOUND = 80.0
"""Log-probabilities are clamped to this many nats in logarithms of other orders, so that none overflows in float32."""


class MirrorStep(NamedTuple):
    """The exact solution of a mirror-descent step, per state."""

    policy: Tensor
    """Probabilities [S, A]."""
    kl: Tensor
    """KL(new || old) [S] in nats."""
    objective: Tensor
    """Value [S] of (D1) there: log(sum_a old e^{t A}) / t."""


def mirror_step(
    policy: Float[Tensor, "*S A"], advantages: Float[Tensor, "*S A"], step: float | Tensor
) -> MirrorStep:
    """Equation (D2) with step size `step` > 0, in nats per unit of advantage; actions of probability 0 stay there."""
    gain = step * advantages
    tilted = policy.log() + gain
    log_norm = tilted.logsumexp(-1, keepdim=True)
    new = (tilted - log_norm).exp()
    return MirrorStep(new, (new * (gain - log_norm)).sum(-1), log_norm[..., 0] / step)


def tsallis_log(x: Float[Tensor, "*shape"], q: float) -> Float[Tensor, "*shape"]:
    """The logarithm of order q, equation (D9); the natural one for q = 1."""
    return tsallis_log_of_exp(x.log(), q)


def tsallis_log_of_exp(log_x: Float[Tensor, "*shape"], q: float) -> Float[Tensor, "*shape"]:
    """log_q of e^{log_x}, equation (D9)."""
    return log_x if q == 1 else ((1 - q) * log_x).expm1() / (1 - q)


def sampled_divergence(
    x: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], q: float = 1.0
) -> Float[Tensor, "*shape"]:
    """One-sample divergence of the new policy from the old at the old one's decisions, equations (D4) and (D9).

    Args:
        x: log-ratios new / old in nats.
        old_logp: log-probabilities under the old policy, constant.
        q: order of the logarithm.

    Returns:
        At least 0, and 0 with gradient 0 at x = 0, for q < 2.
    """
    divergence = x.exp() * tsallis_log_of_exp(x, q) - x.expm1()
    if q == 1:
        return divergence
    return divergence * ((1 - q) * old_logp.detach()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def tsallis_difference(
    logp: Float[Tensor, "*shape"], old_logp: Float[Tensor, "*shape"], q: float
) -> Float[Tensor, "*shape"]:
    """log_{2-q} of the policy minus that of the old one, of log-probabilities clamped to 80 nats either way."""
    new, old = (x.clamp(-LOGP_BOUND, LOGP_BOUND) for x in (logp, old_logp))
    return tsallis_log_of_exp(new, 2 - q) - tsallis_log_of_exp(old, 2 - q)


def mirror_loss(
    ratio: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    divergence: Float[Tensor, "*shape"],
    step: float,
) -> Float[Tensor, "*shape"]:
    """Equations (D3) and (D4) of each decision."""
    return -ratio * advantages + divergence / step


def annealed_step(progress: float, start: float, floor: float) -> float:
    """Equation (D6): the step size when the share `progress` of the run is done."""
    return max(floor, start * (1 - progress))


def soft_policy_loss(
    logp: Float[Tensor, "*shape"],
    old_logp: Float[Tensor, "*shape"],
    q1: Float[Tensor, "*shape"],
    temperature: float,
    inverse_step: float,
    tsallis: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Equation (D7) of each state, at an action drawn anew from the policy; gradients flow through that action in all.

    Args:
        logp: log-probability of the action under the policy, nats.
        old_logp: of the same action before any squashing, under the policy of the last mirror step.
        q1: the first critic's value of the action.
        temperature: lambda, the weight of the entropy.
        inverse_step: kappa = 1 / t_k, the weight of the KL; equal to lambda it is the loss of soft actor-critic.
        tsallis: q; the KL's logarithms are of order 2 - q, of log-probabilities clamped to 80 nats either way.
    """
    if tsallis == 1:
        return inverse_step * logp + (temperature - inverse_step) * old_logp - q1
    return inverse_step * tsallis_difference(logp, old_logp, tsallis) + temperature * old_logp - q1


@register("mdpo")
class MirrorDescent(Surrogate):
    """Importance-weighted advantage minus a divergence over the step size, equations (D3), (D4), (D6), (D9)."""

    zero_advantage_is_silent = False

    class Config(Surrogate.Config):
        """Options of the mirror step."""

        kl: Literal["sampled", "exact", "difference"] = "sampled"
        """"exact": of the whole distribution (D3), where the domain gives it; "sampled": from log-probabilities (D4, D9);
        "difference": the official code's unweighted difference of logarithms of order 2 - q."""
        schedule: Literal["linear", "constant"] = "linear"
        """"linear": the step size falls to `floor` over the run (D6); "constant": it stays."""
        step: float = Field(1.0, gt=0)
        """Step size t at the start, in nats per unit of advantage; larger moves further per iteration."""
        floor: float = Field(0.01, gt=0)
        """Smallest step size of the schedule; 1 / iterations keeps it until the last one."""
        tsallis: float = Field(1.0, ge=0, lt=2)
        """Order q of the logarithms in the sampled divergence (D9); 1: natural."""
        log_ratio_bound: float = Field(LOG_RATIO_BOUND, gt=0)
        """Log-ratios are clamped to this many nats either way."""

        @model_validator(mode="after")
        def _exact_is_natural(self) -> Self:
            if self.kl == "exact" and self.tsallis != 1:
                raise ValueError(f'tsallis = {self.tsallis}: needs kl = "sampled"; the exact KL is natural')
            return self

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.requires = frozenset({"kl"} if self.config.kl == "exact" else ())

    @property
    def step_size(self) -> float:
        """t_k of this iteration, equation (D6)."""
        c = self.config
        return c.step if c.schedule == "constant" else annealed_step(self.progress, c.step, c.floor)

    def divergence(
        self, x: Float[Tensor, "N T"], evaluation: Evaluation, batch: Batch
    ) -> Float[Tensor, "N T"]:
        """Divergence of the policy from the old one at each decision, from the log-ratios `x`."""
        c, old_logp = self.config, zero_outside(batch.old_logp.detach(), batch.mask)
        match c.kl:
            case "exact":
                return evaluation.kl
            case "sampled":
                return sampled_divergence(x, old_logp, c.tsallis)
        return tsallis_difference(evaluation.logp, old_logp, c.tsallis)

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        x = log_ratio(evaluation.logp, batch.old_logp, batch.mask, self.config.log_ratio_bound)
        return mirror_loss(x.exp(), batch.advantages, self.divergence(x, evaluation, batch), self.step_size)


@register("soft_mirror")
class SoftMirrorDescent(SoftSurrogate):
    """The off-policy loss, equation (D7): climbs the critic, held near the policy of the last mirror step."""

    requires = frozenset({"fresh_logp", "fresh_old_logp", "fresh_q"})

    class Config(SoftSurrogate.Config):
        """Options of the mirror step."""

        inverse_step: float = Field(1.0, ge=0)
        """kappa = 1 / t, weight of the KL in units of reward per nat; equal to `temperature` it is soft actor-critic."""
        steps: int = Field(1000, ge=1)
        """Optimizer steps of a mirror step, after which the policy becomes the old one."""
        tsallis: float = Field(1.0, ge=0, lt=2)
        """Order q of the KL, whose logarithms are of order 2 - q (D9); 1: natural."""

    def evaluation_options(self) -> dict[str, Any]:
        return {"mirror_steps": self.config.steps}

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        c, e = self.config, evaluation
        return soft_policy_loss(
            e.fresh_logp, e.fresh_old_logp, e.fresh_q[..., 0], c.temperature, c.inverse_step, c.tsallis
        )


@register_recipe("mdpo")
def mdpo() -> Method:
    """MDPO without a critic: sampled KL, group-relative advantages, ten steps on each rollout."""
    return Method(
        advantage=GroupStandardized(),
        surrogate=MirrorDescent(),
        defaults={"epochs": 10, "max_grad_norm": 0.5},
    )


@register_recipe("mdpo", domain="control")
def mdpo_control() -> Method:
    """The paper's on-policy MDPO: critic, generalised advantages, exact KL, ten steps on each rollout."""
    return Method(
        advantage=GAE(gamma=0.99),
        surrogate=MirrorDescent(kl="exact"),
        regularizers=[ValueLoss()],
        optimizer=Optimizer(eps=1e-5),
        defaults={"prompts": 8, "rollouts": 1, "epochs": 10, "max_grad_norm": 0.5, "lr_schedule": "linear"},
    )


@register_recipe("mdpo-off", domain="control")
def mdpo_off() -> Method:
    """The paper's off-policy MDPO: a step per environment step, a new mirror step every 1000, replay and twin critics."""
    return Method(
        advantage=NoAdvantage(),
        surrogate=SoftMirrorDescent(),
        regularizers=[SoftCritics(), SquaredOutputs()],
        defaults=OFF_POLICY_DEFAULTS,
    )
