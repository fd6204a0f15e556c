r"""OBLR-PO - Optimal Baseline and Learning-Rate Policy Optimization (arXiv 2511.23310, 2025).

RECONSTRUCTED. The sources fix that the baseline of smallest gradient variance is the mean reward weighted by squared
score norms, and that the step which maximises the guaranteed improvement of a smooth objective is governed by the
gradient's signal-to-noise ratio. The estimators of both are the library's.

.. math::
    b_g = \frac{\sum_{j \in g} w_j r_j}{\sum_{j \in g} w_j}, \quad
    b_i = \frac{\sum_{j \ne i} w_j r_j}{\sum_{j \ne i} w_j} \text{ (leave one out)}, \quad A_i = r_i - b_i \tag{3, 4}

.. math::
    w_i = \sum_t m_{it} \lVert e_a - \pi_{it}\rVert^2 = \sum_t m_{it}\big(1 - 2\pi_{it}(a) + \textstyle\sum_v \pi_{it}(v)^2\big) \tag{5}

.. math::
    \hat V = \frac{\sum_p \lVert g_p\rVert^2 - P\lVert\bar g\rVert^2}{P(P-1)}, \quad \hat S = \lVert\bar g\rVert^2 - \hat V, \quad
    \eta = \mathrm{clip}\Big(\eta_{max}\frac{S}{S + V}, \eta_{min}, \eta_{max}\Big) \tag{6, 7}

S and V in (7) are averages with bias correction of the unclipped estimates, S then clipped at 0. Weights that sum to 0
give the plain mean; a group of one has advantage 0. The schedule pays where the rate is too large or the reward noisy;
with a well tuned rate it is slower.

Slots: advantage `oblr` (needs `old_score_sqnorm`, the logit-space proxy (5)); optimizer `snr` (needs one gradient per
prompt, taken before clipping; its rate is the run's times S / (S + V)).

Use it when rewards are noisy and the learning rate is a guess: a grid of rates then gives nearer results, and no run
falls apart at a large one. Not with a well tuned rate and little noise, where the schedule is slower; the baseline alone
mostly ties with the mean, its gain comes when actions are lopsided.

Pitfalls: the weights of long trajectories are larger and dominate the plain baseline; the plain form has a bias of order
1/G. Dividing by the group's deviation breaks the optimality. The factor multiplies any warm-up.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.functional.masked import masked_sum
from polopt.method import Method
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.parts import Advantage, Optimizer
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def optimal_baseline(
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    leave_one_out: bool = False,
) -> Float[Tensor, " N"]:
    """Equation (4): the baseline of each trajectory, float64.

    Args:
        outcome: rewards.
        group: group ids.
        weights: squared score norms, >= 0.
        leave_one_out: exclude the trajectory itself, which is exactly unbiased.
    """
    groups, weights = Groups.of(group), weights.double()
    low = groups.broadcast(groups.min(outcome))
    above = outcome.double() - low
    total, weighted = groups.broadcast(groups.sum(weights)), groups.broadcast(groups.sum(weights * above))
    plain = groups.broadcast(groups.sum(above)) / groups.broadcast(groups.size)
    if leave_one_out:
        size = groups.broadcast(groups.size)
        plain = (groups.broadcast(groups.sum(above)) - above) / (size - 1).clamp(min=1)
        plain = torch.where(size > 1, plain, above)
        total, weighted = total - weights, weighted - weights * above
    enough = total > 1e-12 * groups.broadcast(groups.max(weights)).clamp(min=1e-300)
    baseline = torch.where(enough, weighted / torch.where(enough, total, 1.0), plain)
    return low + torch.where(groups.broadcast(groups.size) > 1, baseline, above)


def score_sqnorm(probs: Float[Tensor, "N T V"], actions: Int[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Equation (5) of each decision: squared norm of the score in logit space, from the probabilities."""
    taken = probs.gather(-1, actions[..., None])[..., 0]
    return 1 - 2 * taken + probs.square().sum(-1)


def signal_and_noise(
    square_sum: Float[Tensor, ""], mean_square: Float[Tensor, ""], prompts: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation (7): raw signal (may be negative) and noise from sum |g_p|^2 and |mean g|^2 of at least two prompts."""
    noise = (square_sum - prompts * mean_square) / (prompts * (prompts - 1))
    return mean_square - noise, noise


@register("oblr")
class OptimalBaseline(Advantage):
    """Reward less the score-norm-weighted mean of the group, equations (3) to (5)."""

    requires = frozenset({"old_score_sqnorm"})
    reconstructed = (
        "the estimators of the baseline and of the signal-to-noise ratio (the paper's are not public)"
    )

    class Config(Settings):
        """Options of the baseline."""

        leave_one_out: bool = False
        """Leave the trajectory itself out; recommended up to 16 rollouts."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        weights = masked_sum(batch.signal("old_score_sqnorm"), batch.mask)
        outcome = batch.outcome()
        return (outcome - optimal_baseline(outcome, batch.group, weights, self.config.leave_one_out))[:, None]


@register("snr")
class SignalToNoise(Optimizer):
    """AdamW whose learning rate is scaled by the gradient's signal-to-noise ratio, equations (6), (7)."""

    reconstructed = OptimalBaseline.reconstructed
    per_group_gradients = True
    averages: Tensor
    updates: Tensor

    class Config(Optimizer.Config):
        """Options of the schedule."""

        ema: float = Field(0.9, ge=0, lt=1)
        """Factor of the averages of signal and noise; 0 takes each update's own."""
        lr_min_share: float = Field(0.0, ge=0, le=1)
        """Smallest share of the run's learning rate."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("averages", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64))

    def corrected(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Averages of signal and noise with bias correction; NaN before the first update."""
        signal, noise = self.averages / (1 - self.config.ema**self.updates)
        return signal, noise

    def rate_share(self, square_sum: Tensor, mean_square: Tensor, groups: int) -> float:
        c = self.config
        if groups > 1:
            found = torch.stack(signal_and_noise(square_sum.double(), mean_square.double(), groups))
            self.averages.mul_(c.ema).add_((1 - c.ema) * found)
            self.updates += 1
        if self.updates == 0:
            return c.lr_min_share
        signal, noise = self.corrected()
        signal = signal.clamp(min=0)
        share = float(signal / (signal + noise)) if signal + noise > 0 else 0.0
        return min(1.0, max(c.lr_min_share, share))


@register_recipe("oblr_po")
def oblr_po() -> Method:
    """OBLR-PO: optimal baseline, score-function loss, learning rate by signal-to-noise ratio."""
    return Method(advantage=OptimalBaseline(), surrogate=ScoreFunction(), optimizer=SignalToNoise())
