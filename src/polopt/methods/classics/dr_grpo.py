r"""Dr. GRPO - Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783, 2025).

GRPO without its two biases: no division by the group's standard deviation, which favours prompts that are nearly
always or never solved, and no division by a trajectory's own length, which favours short successes and long failures.

.. math::
    A_i = R_i - \mathrm{mean}_g R \tag{1}

.. math::
    L = \frac1{N C} \sum_i \sum_t \max(-A_i r_{it}, -A_i\,\mathrm{clip}(r_{it}, 1-\epsilon, 1+\epsilon)) \tag{2}

C is a constant, the length limit in the paper's code: `--surrogate ppo:aggregation=constant,constant=512`. The recipe
takes the longest trajectory of the minibatch.

Slots: advantage (1); the surrogate is PPO's, averaged as in (2).

Use it when GRPO's failures grow longer and longer, or prompts of extreme difficulty dominate. Not where rewards of prompts
differ in scale: nothing levels them here.

Pitfalls: without the division by the deviation advantages of 0/1 rewards are smaller (at most 1), so the learning rate is
not GRPO's. Left to itself, C is the longest trajectory of the minibatch and moves: set it to the length limit.
"""

from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Advantage
from polopt.registry import register, register_recipe


@register("dr_grpo")
class GroupCentred(Advantage):
    """Reward less the group's mean, equation (1), in reward units; 0 in a group of one."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        return Groups.of(batch.group).centre(batch.outcome())[:, None]


@register_recipe("dr_grpo")
def dr_grpo() -> Method:
    """Dr. GRPO with one update per rollout."""
    return Method(advantage=GroupCentred(), surrogate=PPOClip(aggregation="constant"))
