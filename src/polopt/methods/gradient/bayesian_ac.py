r"""BAC - Bayesian Policy Gradient and Actor-Critic Algorithms (Ghavamzadeh, Engel & Valko, JMLR 17(66), 2016).

The actor-critic of the paper. A Gaussian process models the action value Q(z), z = (x, a), and is conditioned on the
rewards of all transitions at once (Gaussian process temporal differences). Its kernel is a state kernel plus the Fisher
kernel of the scores :math:`u(z)=\nabla\log\pi_\theta(a|x)`. The state kernel plays the part of a value function: it
explains returns but drops out of the gradient, since :math:`\sum_a\nabla\pi(a|x)=0`.

.. math::
    k(z,z') = c_x\exp(-\|x-x'\|^2/2\ell^2) + c_F\,u(z)^\top G^{-1}u(z') \tag{kernel}

.. math::
    r_i = Q(z_i)-\gamma Q(z_{i+1})+N_i,\quad r = Q(z)+N\ \text{at the end of an episode},\quad
    N \sim \mathcal N(0, \sigma^2HH^\top) \tag{model}

.. math::
    \alpha = H^\top(HKH^\top+\sigma^2HH^\top)^{-1}r = (K+\sigma^2I)^{-1}H^{-1}r,\quad
    E[\nabla\eta] = c_FU\alpha,\quad \mathrm{cov} = c_FG-c_F^2UCU^\top \tag{posterior}

H is 1 on the diagonal and -gamma right of it inside an episode, so :math:`H^{-1}r` are the discounted returns-to-go and
:math:`C=(K+\sigma^2I)^{-1}`. The Fisher matrix is the mean over episodes of :math:`\sum_t\gamma^tu_tu_t^\top`, plus a
ridge, so that :math:`c_FU\alpha` is the gradient of the expected discounted return. With `nu` the transitions are
visited in order by the sparse recursion of the authors' routine, whose dictionary is made anew at each iteration; with
every transition in it, it equals the closed form.

Slots: advantage `gptd`, with state (the Fisher matrix). Aggregation `sequence_mean_token_sum`: the advantages are
M c_F alpha, so that the loss is :math:`-c_F\sum_{it}\alpha_{it}\log\pi_{it}`. In control the recipe asks
for rewards per step and uses the dictionary with the paper's threshold.

Use it when episodes are long and rewards come at each step: it has less variance than the trajectory weights of
`bayesian`. Not for partially observed problems, for which Q of what is observed has no meaning, nor beyond some ten
thousand decisions of an iteration without `nu`: the closed form factorises a matrix of that size.

Pitfalls: without the state kernel, and with the Fisher matrix of the same sample, it is REINFORCE with returns-to-go,
shrunk. States are the features of the actor's last layer, whose scale changes while it learns: leave `lengthscale` open,
which takes the median distance, unless they are fixed features.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.returns import outcome_at_last
from polopt.method import Method
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.gradient.ascent import Ascent
from polopt.methods.gradient.fisher import Fisher, FisherConfig, FisherEstimator
from polopt.methods.gradient.gptd import Kernel, gptd, sparse_gptd
from polopt.parts import Advantage
from polopt.registry import register, register_recipe


def gaussian_kernel(
    states: Float[Tensor, "D F"], others: Float[Tensor, "E F"], lengthscale: float
) -> Float[Tensor, "D E"]:
    """exp(-|x - x'|^2 / 2 l^2) of all pairs, float64."""
    distance = torch.cdist(states.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-distance.square() / (2 * lengthscale**2))


def median_distance(states: Float[Tensor, "D F"], most: int = 1000) -> float:
    """Median distance between different states, of evenly spread ones if there are more than `most`; 1 if all are equal."""
    some = states[:: -(-len(states) // most)].double() if len(states) else states.double()
    distances = torch.pdist(some)
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 1.0


def discounted_rows(
    scores: Float[Tensor, "N T n"], mask: Bool[Tensor, "N T"], gamma: float
) -> Float[Tensor, "D n"]:
    """sqrt(gamma^t) u_t of all decisions, t counting an episode's decisions: their second moment is the Fisher matrix."""
    step = mask.cumsum(-1)[mask] - 1
    return scores[mask].double() * gamma ** (step[:, None].double() / 2)


def decision_kernel(
    scores: Float[Tensor, "D n"],
    states: Float[Tensor, "D F"] | None,
    fisher: Fisher,
    c_state: float,
    c_fisher: float,
    lengthscale: float,
) -> Float[Tensor, "D D"]:
    """Equation (kernel) for all pairs of decisions; without states the Fisher kernel alone."""
    kernel = c_fisher * fisher.products(scores)
    return kernel if states is None else kernel + c_state * gaussian_kernel(states, states, lengthscale)


def kernel_by_number(
    scores: Float[Tensor, "D n"],
    states: Float[Tensor, "D F"] | None,
    fisher: Fisher,
    c_state: float,
    c_fisher: float,
    lengthscale: float,
) -> tuple[Kernel, Float[Tensor, " D"]]:
    """Equation (kernel) as a function of the decisions' numbers, and of each with itself: no matrix of all pairs."""
    scores = scores.double()
    solved = fisher.solve(scores)

    def kernel(members: list[int], point: int) -> Tensor:
        found = c_fisher * (scores[members] @ solved[point])
        if states is None:
            return found
        return found + c_state * gaussian_kernel(states[members], states[point][None], lengthscale)[:, 0]

    return kernel, c_fisher * (scores * solved).sum(-1) + (0.0 if states is None else c_state)


@register("gptd")
class GPTD(Advantage):
    """Weights of the decisions by Gaussian process temporal differences, equation (posterior), times M."""

    class Config(FisherConfig):
        """Options of the Gaussian process."""

        ridge: float = Field(1e-6, gt=0)
        """Added to the diagonal of the Fisher matrix, in its units (squared score)."""
        memory: float = Field(0.0, ge=0, lt=1)
        """Weight of the earlier iterations' scores relative to this one's, per iteration; 0: this sample alone."""
        gamma: float = Field(0.99, ge=0, le=1)
        """Discount per decision."""
        noise: float = Field(9.0, ge=1e-6)
        """Variance of the noise of a return, in squared reward units."""
        c_state: float = Field(1.0, ge=0)
        """Scale of the state kernel, in squared reward units; 0: none, and no features are asked for."""
        c_fisher: float = Field(1.0, gt=0)
        """Scale of the Fisher kernel, in squared reward units."""
        lengthscale: float | None = Field(None, gt=0)
        """Width of the state kernel, in units of the features; None: their median distance in the iteration."""
        dense: bool = False
        """Ask the domain for rewards per decision; otherwise a reward that is not given so counts at the last decision."""
        nu: float | None = None
        """Threshold of the dictionary, in units of the kernel (paper: 0.1); None: the closed form over all decisions."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        c = self.config
        wanted = {"decision_scores": True, "old_features": c.c_state > 0, "step_rewards": c.dense}
        self.requires = frozenset(name for name, needed in wanted.items() if needed)
        self.fisher = FisherEstimator(c.ridge, c.memory, c.rank)

    def forward(self, batch: Batch) -> Float[Tensor, "N T"]:
        c, mask = self.config, batch.mask
        advantages = torch.zeros(mask.shape, dtype=torch.float64)
        if not bool(mask.any()):
            return advantages
        scores, states = batch.decision_scores[mask].double(), self._states(batch)
        fisher = self.fisher(discounted_rows(batch.decision_scores, mask, c.gamma), self._episodes(batch))
        rewards = outcome_at_last(batch.rewards.double().nan_to_num(0.0, 0.0, 0.0).sum(-1), mask)
        if batch.step_rewards is not None:
            rewards = rewards + torch.where(mask, batch.step_rewards.double(), 0.0)
        scale = median_distance(states) if c.lengthscale is None else c.lengthscale
        alpha = self._alpha(rewards, mask, scores, states if c.c_state else None, fisher, scale)
        advantages[mask] = c.c_fisher * alpha * self._episodes(batch)
        return advantages

    def observe(self, batch: Batch) -> None:
        if bool(batch.mask.any()):
            rows = discounted_rows(batch.decision_scores, batch.mask, self.config.gamma)
            self.fisher.observe(rows, self._episodes(batch))

    def _alpha(
        self,
        rewards: Tensor,
        mask: Tensor,
        scores: Tensor,
        states: Tensor | None,
        fisher: Fisher,
        lengthscale: float,
    ) -> Float[Tensor, " D"]:
        c = self.config
        if c.nu is None:
            kernel = decision_kernel(scores, states, fisher, c.c_state, c.c_fisher, lengthscale)
            return gptd(rewards, mask, kernel, c.gamma, c.noise).alpha
        between, own = kernel_by_number(scores, states, fisher, c.c_state, c.c_fisher, lengthscale)
        values, members = sparse_gptd(rewards, mask, between, own, c.gamma, c.noise, c.nu)
        return torch.zeros(len(scores), dtype=torch.float64).index_put((members,), values.alpha)

    def _states(self, batch: Batch) -> Float[Tensor, "D F"]:
        if self.config.c_state:
            return batch.signal("old_features")[batch.mask].double()
        return torch.zeros(int(batch.mask.sum()), 1, dtype=torch.float64)

    def _episodes(self, batch: Batch) -> int:
        return int(batch.mask.any(-1).sum())


def _method(**options: Any) -> Method:
    surrogate = ScoreFunction(aggregation="sequence_mean_token_sum")
    return Method(advantage=GPTD(**options), surrogate=surrogate, optimizer=Ascent())


@register_recipe("bac")
def bac() -> Method:
    """Bayesian actor-critic: the closed form over all decisions, plain ascent."""
    return _method()


@register_recipe("bac", "control")
def bac_control() -> Method:
    """Bayesian actor-critic on rewards per step, with the paper's dictionary."""
    return _method(dense=True, nu=0.1)
