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
    L_\pi = \mathrm{mean}\big[\kappa\log\pi_\theta + (\lambda-\kappa)\log\pi_k - Q_1\big], \quad
    V \to \min(Q_1,Q_2) - \lambda\log\pi_\theta, \quad y = R + (1-d)\gamma\bar V(s') \tag{D7, D8}

.. math::
    \log_q x = \frac{x^{1-q}-1}{1-q}, \quad
    D_q = r(\log_q\pi_\theta - \log_q\pi_k) - (r-1)\,\pi_k^{1-q} \tag{D9}

(D3) needs the whole distribution (`kl="exact"`: control). (D4) works from log-probabilities (`kl="sampled"`: tokens,
denoising steps); it is derived here, and it and its gradient equal (D3) in expectation over the data. Advantages are
standardised (D5), so that a step size of 1 is one standard deviation.

The paper puts log_q in place of the logarithms of the KL. (D9) is the Bregman divergence that this makes on average over
the data: it is 0 with gradient 0 at the old policy and (D4) at q = 1. The official code takes the plain difference of
logarithms of order 2 - q without importance weights: `kl="difference"`.

(D7, D8) are the off-policy losses; with kappa = lambda they are those of soft actor-critic. The paper's critic takes 5
epochs of minibatches of its own, here it descends in the policy's steps.

Use it when several updates per rollout should stay stable without a clip to tune, or as the smooth baseline of a
clipped method. Not when there is one update per rollout: the divergence then has no gradient and the method is the plain
policy gradient.

Pitfalls: as t_k falls, 1/t_k scales the loss and its gradient norm, so keep gradients clipped and `floor` above 0. The
divergence has the new policy first. The form for control has no reward normalisation of its own, and its value loss no
clip (the paper: both).

Slots: surrogate `mdpo`. The recipe has the sampled KL and a group baseline on any domain; its form for control is the
paper's on-policy agent: critic, generalised advantages, exact KL; what other libraries call MDPO.
"""

from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import zero_outside
from polopt.functional.ratio import LOG_RATIO_BOUND, log_ratio
from polopt.method import Method, Optimizer, Surrogate
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import GAE, ValueLoss
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
) -> Float[Tensor, "*shape"]:
    """Equation (D7) of each state, at an action drawn anew from the policy; gradients flow through that action in all.

    Args:
        logp: log-probability of the action under the policy, nats.
        old_logp: of the same action before any squashing, under the policy of the last mirror step.
        q1: the first critic's value of the action.
        temperature: lambda, the weight of the entropy.
        inverse_step: kappa = 1 / t_k, the weight of the KL; equal to lambda it is the loss of soft actor-critic.
    """
    return inverse_step * logp + (temperature - inverse_step) * old_logp - q1


def soft_value_target(
    q1: Float[Tensor, "*shape"],
    q2: Float[Tensor, "*shape"],
    logp: Float[Tensor, "*shape"],
    temperature: float,
) -> Float[Tensor, "*shape"]:
    """Equation (D8): what the state value is fitted to, constant."""
    return (torch.minimum(q1, q2) - temperature * logp).detach()


def soft_q_target(
    reward: Float[Tensor, "*shape"],
    terminated: Float[Tensor, "*shape"],
    next_value: Float[Tensor, "*shape"],
    gamma: float,
) -> Float[Tensor, "*shape"]:
    """Equation (D8): what both critics are fitted to, constant; `next_value` is the target network's."""
    return (reward + (1 - terminated) * gamma * next_value).detach()


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
        new, old = (logp.clamp(-LOGP_BOUND, LOGP_BOUND) for logp in (evaluation.logp, old_logp))
        return tsallis_log_of_exp(new, 2 - c.tsallis) - tsallis_log_of_exp(old, 2 - c.tsallis)

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        x = log_ratio(evaluation.logp, batch.old_logp, batch.mask, self.config.log_ratio_bound)
        return mirror_loss(x.exp(), batch.advantages, self.divergence(x, evaluation, batch), self.step_size)


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
