r"""GRPO - Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, 2024).

The mean reward of a prompt's own rollouts is the baseline, their standard deviation the scale: no critic.

.. math::
    A_i = \frac{R_i - \mathrm{mean}_g R}{\mathrm{std}_g R + \epsilon} \tag{1}

.. math::
    L = \frac1N \sum_i \frac1{L_i} \sum_t
        \big[\max(-A_i r_{it}, -A_i\,\mathrm{clip}(r_{it}, 1-\epsilon_l, 1+\epsilon_h)) + \beta\,\mathrm{k3}_{it}\big] \tag{2}

Slots: advantage (1), surrogate PPO clip averaged per sequence (2), regularizer KL to the reference (k3). The recipe has
beta = 0, as practice has settled since; `--regularizer kl:coef=0.04` is the paper's.

Use it with verifiable rewards and several rollouts of each prompt: the default choice. Not with one rollout a prompt, which
has no group and advantage 0, and not when the reward comes per step: that calls for a critic (`ppo`).

Pitfalls: groups that all succeed or all fail teach nothing and waste rollouts (`dapo`, `copo`, `knapsack_rl`). A group
with one success of many has a large advantage. The mean over each sequence favours short successes and long failures
(`dr_grpo`).
"""

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Advantage
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def group_standardized(
    outcome: Float[Tensor, " N"], group: Int[Tensor, " N"], eps: float = 1e-6, unbiased: bool = True
) -> Float[Tensor, " N"]:
    """Equation (1): deviation from the group's mean over the group's standard deviation.

    Returns:
        [N], dimensionless; exactly 0 in a group of one and in a group whose rewards are all equal.
    """
    groups = Groups.of(group)
    return groups.centre(outcome) / (groups.broadcast(groups.std(outcome, unbiased)) + eps)


@register("grpo")
class GroupStandardized(Advantage):
    """Group-relative advantage, equation (1)."""

    class Config(Settings):
        """Options of the group-relative advantage."""

        eps: float = Field(1e-6, gt=0)
        """Added to the standard deviation, in reward units."""
        unbiased: bool = True
        """Divide the squares by G - 1; False divides by G."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        c = self.config
        return group_standardized(batch.outcome(), batch.group, c.eps, c.unbiased)[:, None]


@register_recipe("grpo")
def grpo() -> Method:
    """GRPO with one update per rollout."""
    return Method(advantage=GroupStandardized(), surrogate=PPOClip(aggregation="sequence_mean"))
