r"""MHPO - Modulated Hazard-aware Policy Optimization for Stable Reinforcement Learning (arXiv 2603.16929, 2026).

No clip and no min: the log-ratio is squashed into (-c, c) by a scaled tanh and the weight that results is damped by
exp(-hazard), a Weibull cumulative hazard of its own for upward and for downward shifts, constant for the gradient.

.. math::
    \psi(x) = c \tanh(x / c), \quad s(z) = \log(1 + e^z) \tag{M1, M2}

.. math::
    \zeta = \Big(\frac{s(\mathrm{sg}[\psi])}{\lambda_+}\Big)^{k_+}
          + \Big(\frac{s(-\mathrm{sg}[\psi])}{\lambda_-}\Big)^{k_-}, \quad w = \exp(\psi - \zeta) \tag{M3, M4}

.. math::
    L = -\frac1K \sum_i \frac1{T_i} \sum_t m_{it} w_{it} A_{it}, \quad
    \frac{\partial L}{\partial \log\pi_{it}} = -a_{it} A_{it} e^{\psi-\zeta} \big(1 - (\psi/c)^2\big) \tag{M5, M6}

The weight at ratio 1 is 0.265 with the defaults, not 1: with plain SGD the learning rate has to be larger. Bounds every
decision's gradient by e^c |A|, but not the total drift.

Slots: surrogate. Aggregation `sequence_mean` (paper); a public port uses `token_mean`.

Use it with stale data or many updates per rollout, where unbounded ratios of bad decisions ruin clipped GRPO. Not on
policy with very large steps: it bounds each gradient, not where they lead, and entropy may go early.

Pitfalls: gradient norms are about a quarter of GRPO's; compare them divided by 0.265. One public digest adds the hazards
to the loss instead of damping the weight: another method. Softplus is not 0 at 0, so both hazards always act.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from polopt.batch import Batch, Evaluation
from polopt.functional.aggregation import Aggregation
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe


class Modulation(NamedTuple):
    """The weight of each decision and what it is made of, [N, T]."""

    psi: Tensor
    """Squashed log-ratio in nats."""
    zeta: Tensor
    """Hazard, constant for the gradient."""
    weight: Tensor
    """exp(psi - zeta)."""


def modulate(
    x: Float[Tensor, "*shape"],
    c: float,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    use_hazard: bool = True,
) -> Modulation:
    """Equations (M1) to (M4) of log-ratios `x` in nats."""
    psi = c * torch.tanh(x / c)
    held = psi.detach()  # the hazard damps the step; differentiated, it would reverse it at large ratios
    zeta = (softplus(held) / lambda_pos) ** k_pos + (softplus(-held) / lambda_neg) ** k_neg
    zeta = zeta if use_hazard else torch.zeros_like(zeta)
    return Modulation(psi, zeta, torch.exp(psi - zeta))


@register("mhpo")
class ModulatedHazard(Surrogate):
    """Smooth ratio control by modulation and hazard, equations (M1) to (M5)."""

    class Config(Surrogate.Config):
        """Options of the modulation."""

        aggregation: Aggregation = "sequence_mean"
        """What is averaged over what (paper: sequence_mean)."""
        c: float = Field(1.5, gt=0)
        """Range of the squashed log-ratio in nats; 0.5 and 2 were worse (paper)."""
        k_pos: float = Field(1.5, gt=0)
        """Shape of the hazard of upward shifts."""
        lambda_pos: float = Field(1.0, gt=0)
        """Scale of the hazard of upward shifts; smaller damps more."""
        k_neg: float = Field(2.0, gt=0)
        """Shape of the hazard of downward shifts."""
        lambda_neg: float = Field(0.8, gt=0)
        """Scale of the hazard of downward shifts."""
        use_hazard: bool = True
        """False leaves the squashed ratio alone."""

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        c = self.config
        x = log_ratio(evaluation.logp, batch.old_logp, batch.mask)
        found = modulate(x, c.c, c.k_pos, c.lambda_pos, c.k_neg, c.lambda_neg, c.use_hazard)
        return -found.weight * batch.advantages


@register_recipe("mhpo")
def mhpo() -> Method:
    """MHPO on GRPO's advantages, four updates per rollout."""
    return Method(advantage=GroupStandardized(), surrogate=ModulatedHazard(), defaults={"minibatches": 4})
