r"""RLOO - Back to Basics: Revisiting REINFORCE Style Optimization for RLHF (arXiv 2402.14740, 2024).

The baseline of a trajectory is the mean reward of the prompt's other rollouts: it is independent of the trajectory,
so the gradient is unbiased, and nothing is divided by a standard deviation.

.. math::
    A_i = R_i - \frac1{G-1}\sum_{j \ne i} R_j = \frac{G}{G-1}\,(R_i - \mathrm{mean}_g R) \tag{1}

The loss is REINFORCE's, summed over the decisions of a trajectory. The paper pays for the KL to the reference in the
reward: `--shaping kl:coef=0.05`; the recipe does not.

Slots: advantage.

Use it for an unbiased gradient with a baseline per prompt and no tuning: fresh data, one update per rollout. Not with
several updates per rollout: it has no ratio (`--surrogate ppo` gives it one).

Pitfalls: advantages are in reward units, so rewards of different scale need another learning rate. With two rollouts it is
the difference of two rewards and noisy; four to eight are usual. The loss sums over decisions: long completions count more.
"""

from jaxtyping import Float, Int
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.parts import Advantage
from polopt.registry import register, register_recipe


def leave_one_out(outcome: Float[Tensor, " N"], group: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Equation (1): reward less the mean of the group's other rewards.

    Returns:
        [N] float64, reward units; exactly 0 in a group of one and in a group whose rewards are all equal.
    """
    return Groups.of(group).leave_one_out(outcome)


@register("rloo")
class LeaveOneOut(Advantage):
    """Leave-one-out advantage, equation (1)."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        return leave_one_out(batch.outcome(), batch.group)[:, None]


@register_recipe("rloo")
def rloo() -> Method:
    """RLOO with one update per rollout."""
    return Method(advantage=LeaveOneOut(), surrogate=ScoreFunction(aggregation="sequence_mean_token_sum"))
