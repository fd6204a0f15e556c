r"""Entropy bonus (Williams & Peng, Connection Science 3, 1991; Mnih et al., arXiv 1602.01783).

.. math::
    L = \ldots - c\,\mathcal H(\pi_\theta(\cdot|s_{it})) \tag{1}

averaged over the decisions like the surrogate's loss: it delays the collapse onto one answer.

Slots: regularizer `entropy`; needs the exact `entropy` of each decision.

Use it when a policy collapses onto one answer before it has explored. Not as a cure for a noisy reward, and not with a
large vocabulary and a coefficient from control: most of the entropy there is is of tokens that mean nothing.

Pitfalls: the coefficient is in reward units per nat; one that helps early blurs a policy late. It has no set point:
`dcpo` and `entropy_band` have.
"""

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.parts import Regularizer
from polopt.registry import register


@register("entropy")
class EntropyBonus(Regularizer):
    """Pays `coef` reward units for each nat of entropy, equation (1); 0.0001 to 0.01."""

    requires = frozenset({"entropy"})

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return -evaluation.entropy
