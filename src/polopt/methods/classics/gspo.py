r"""GSPO - Group Sequence Policy Optimization (Zheng et al., arXiv 2507.18071, 2025).

The importance ratio belongs to what is rewarded, the sequence: its length-normalised likelihood ratio is clipped, so
that a trajectory is kept or cut off as a whole and no single token's ratio adds noise.

.. math::
    s_i = \Big(\frac{\pi_\theta(y_i|x)}{\pi_{old}(y_i|x)}\Big)^{1/L_i}
        = \exp\Big(\frac1{L_i}\sum_t \log\frac{\pi_\theta(a_{it})}{\pi_{old}(a_{it})}\Big) \tag{7}

.. math::
    L = \frac1N\sum_i \max(-A_i s_i, -A_i\,\mathrm{clip}(s_i, 1-\epsilon_l, 1+\epsilon_h)), \quad
    \nabla L = -\frac1N\sum_i s_i A_i \frac1{L_i}\sum_t \nabla\log\pi_\theta(a_{it}) \tag{5, 10}

.. math::
    s_{it} = \mathrm{sg}[s_i]\,\frac{\pi_\theta(a_{it})}{\mathrm{sg}[\pi_\theta(a_{it})]} \tag{14}

`variant="token"` is GSPO-token (14): the same value, and for advantages that are equal inside a trajectory the same
gradient, but each decision may have its own advantage. With one decision a trajectory it is PPO's surrogate.

Slots: surrogate; the advantage is GRPO's. The clip is two orders narrower than GRPO's, as the ratio is a mean.

Use it with long completions, several updates per rollout, or routed experts, whose token ratios jump. With one update per
rollout the ratio is 1 and it is GRPO: not worth it there.

Pitfalls: the clip is in mean log-ratio: 0.2 would never act, and 3e-4 acts at once where PPO's would not. Small models and
short completions move more per update and want it wider. That far more is cut off than by PPO's clip is intended.
"""

from typing import Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.ratio import clipped_surrogate, sequence_log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe


@register("gspo")
class SequenceClip(Surrogate):
    """The clipped sequence ratio, equations (5) and (7), or with its gradient token by token, (14)."""

    coupling = "sequence"

    class Config(Surrogate.Config):
        """Options of the sequence clip."""

        aggregation: Literal["sequence_mean", "group_mean"] = "sequence_mean"
        """Every trajectory weighs the same."""
        variant: Literal["sequence", "token"] = "sequence"
        """Through which ratio the gradient flows: (7), or (14)."""
        clip_low: float = Field(3e-4, ge=0, lt=1)
        """Sequence ratios below 1 - clip_low are cut off where A < 0 (paper: 3e-4)."""
        clip_high: float = Field(4e-4, ge=0)
        """Sequence ratios above 1 + clip_high are cut off where A > 0 (paper: 4e-4)."""

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        log_ratio = sequence_log_ratio(evaluation.logp, batch.old_logp, batch.mask)
        if self.config.variant == "token":
            # the value is the sequence's, the gradient the decision's own
            log_ratio = log_ratio.detach() + evaluation.logp - evaluation.logp.detach()
        ratio = log_ratio.exp().expand(batch.mask.shape)
        return clipped_surrogate(ratio, batch.advantages, self.config.clip_low, self.config.clip_high)

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"]:
        ratio = sequence_log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        above = (ratio > 1 + self.config.clip_high) & (batch.advantages > 0)
        return above | (ratio < 1 - self.config.clip_low) & (batch.advantages < 0)


@register_recipe("gspo")
def gspo() -> Method:
    """GSPO with the paper's clip, four minibatches per rollout."""
    return Method(advantage=GroupStandardized(), surrogate=SequenceClip(), defaults={"minibatches": 4})
