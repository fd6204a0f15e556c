r"""BPG - Bayesian Policy Gradient and Actor-Critic Algorithms (Ghavamzadeh, Engel & Valko, JMLR 17(66), 2016).

The policy gradient is an integral over trajectories. Instead of averaging samples of the integrand, a Gaussian process
models one factor of it, is conditioned on the trajectories seen and integrated (Bayesian quadrature). With a Fisher
kernel the integrals are closed-form and the posterior mean is a weighted sum of score vectors: the estimate is an
advantage like any other. Whole trajectories are observed, not states, so it holds for partially observed problems too.
With scores :math:`u_i = \sum_t \nabla\log\pi_\theta(a_t|o_t)`, their matrix U [n, M], the Fisher matrix
:math:`G = E[uu^\top]`, :math:`\ell_{ij} = u_i^\top G^{-1}u_j` and returns R:

.. math::
    K_{ij} = (1+\ell_{ij})^2,\ b_i = 1+\ell_{ii},\ w_i = R_i\,(Cb)_i,\quad
    \mathrm{cov} = (1+n-b^\top Cb)\,I \tag{model 1}

.. math::
    K_{ij} = \ell_{ij},\ w = CR,\quad \mathrm{cov} = G-UCU^\top,\qquad C=(K+\sigma^2I)^{-1} \tag{model 2}

.. math::
    E[\nabla\eta(\theta)] = \sum_i w_iu_i,\quad \theta \leftarrow \theta + \beta_j\sum_iw_iu_i\ \text{or}\
    \theta + \beta_jG^{-1}\sum_iw_iu_i,\quad \beta_j=\beta_0\frac{\beta_c}{\beta_c+j} \tag{step}

Online sparsification visits the trajectories in order and keeps those in a dictionary D whose kernel function is not
within tau of the span of the kept ones; A [M, m] are the projections, :math:`\tilde K` the kernel over D:

.. math::
    P = (A^\top A\tilde K+\sigma^2I)^{-1}A^\top,\quad w_i = R_i\,(\tilde b^\top P)_i\ \text{(1)},\quad
    w_D = PR\ \text{(2)} \tag{sparse}

G is estimated from the scores of this iteration and, with `memory`, of earlier ones, plus a ridge. It is held by its
leading directions, so the number of parameters may exceed that of the trajectories. The paper has no baseline; here the
mean return is subtracted by default, since a constant lies outside the span of a linear Fisher kernel.
The variance of the noise is the one that reproduces the paper's bandit table.

Slots: advantage `bayesian` (models 1 and 2, dense or sparse) with state (the Fisher matrix), optimizer `ascent`
(step). Aggregation `sequence_mean_token_sum`: the advantages are M w_i, so that the loss is :math:`-\sum_i w_i\log p`.

Use it when a few hundred to a few thousand parameters are trained from few, expensive trajectories; the gain over
averaging is largest where the Fisher matrix is known from more data than the estimate itself. Not for whole language
models: the score vectors alone are trajectories x parameters.

Pitfalls: with model 2 and the Fisher matrix of the same sample the estimate is the Monte-Carlo one shrunk by
M / (M + noise), with model 2 and returns that are not centred it is poor. The advantages are per trajectory and already
weighted: average nothing over their decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.gradient.ascent import Ascent
from polopt.methods.gradient.fisher import Fisher, FisherConfig, FisherEstimator
from polopt.parts import Advantage
from polopt.registry import register, register_recipe

Model = Literal[1, 2]


class Dictionary:
    """Basis points, with the Cholesky factor of their kernel matrix, which grows by a row at a time."""

    def __init__(self) -> None:
        self._factor = torch.zeros(8, 8, dtype=torch.float64)
        self.members: list[int] = []

    @property
    def factor(self) -> Float[Tensor, "m m"]:
        """Lower Cholesky factor of the kernel matrix."""
        return self._factor[: len(self.members), : len(self.members)]

    def project(
        self, kernel: Float[Tensor, " m"], own: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, " m"], float]:
        """Coefficients of the nearest point in the span, and the squared distance to it."""
        low = torch.linalg.solve_triangular(self.factor, kernel[:, None], upper=False)
        onto = torch.linalg.solve_triangular(self.factor.T, low, upper=True)[:, 0]
        return onto, float(own - low.square().sum())

    def add(self, point: int, kernel: Float[Tensor, " m"], own: Float[Tensor, ""]) -> None:
        """Take in a point, given its kernel with the members and with itself."""
        size = len(self.members)
        if size == len(self._factor):
            self._factor = nn.functional.pad(self._factor, (0, size, 0, size))
        low = torch.linalg.solve_triangular(self.factor, kernel[:, None], upper=False)[:, 0]
        apart = (own - low.square().sum()).clamp(min=1e-15 * float(own) + 1e-300)
        self._factor[size, :size], self._factor[size, size] = low, apart.sqrt()
        self.members.append(point)


@dataclass(frozen=True)
class Sparsification:
    """A dictionary of m points for M points."""

    members: Int[Tensor, " m"]
    projections: Float[Tensor, "M m"]
    """A: coefficients of each point in the dictionary as it was when the point was visited."""
    distances: Float[Tensor, " M"]
    """delta: squared distance of each point to the span at that time."""
    factor: Float[Tensor, "m m"]
    """Lower Cholesky factor of the dictionary's kernel matrix."""


def sparsify(
    kernel: Callable[[list[int], int], Tensor], own: Float[Tensor, " M"], tau: float
) -> Sparsification:
    """Online sparsification: the points in order, each kept if it is further than `tau` from the span of those kept.

    Args:
        kernel: of the points in a list with one point, [m].
        own: kernel of each point with itself.
        tau: threshold of the squared distance, in units of the kernel; the first point always enters.
    """
    found, distances, projections = Dictionary(), [], []
    for point in range(len(own)):
        row = kernel(found.members, point)
        onto, distance = found.project(row, own[point])
        if distance > tau or not found.members:
            found.add(point, row, own[point])
            onto = torch.eye(len(found.members), dtype=torch.float64)[-1]
        distances.append(distance)
        projections.append(onto)
    matrix = torch.zeros(len(own), len(found.members), dtype=torch.float64)
    for point, onto in enumerate(projections):
        matrix[point, : len(onto)] = onto
    members = torch.tensor(found.members, dtype=torch.int64)
    return Sparsification(members, matrix, torch.tensor(distances, dtype=torch.float64), found.factor.clone())


@dataclass(frozen=True)
class GradientPosterior:
    """What is believed of the gradient: mean sum_i w_i u_i, covariance prior - U reduction U^T."""

    scores: Float[Tensor, "M n"]
    weights: Float[Tensor, " M"]
    prior: Float[Tensor, "n n"] | Callable[[], Tensor]
    reduction: Float[Tensor, "M M"] | None

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """Posterior mean."""
        return self.weights @ self.scores

    @property
    def covariance(self) -> Float[Tensor, "n n"]:
        """Posterior covariance, written out: n x n numbers."""
        prior = self.prior if isinstance(self.prior, Tensor) else self.prior()
        return prior if self.reduction is None else prior - self.scores.T @ self.reduction @ self.scores


def fisher_kernel(products: Tensor, model: Model) -> Tensor:
    """The kernel between trajectories, from u_i^T G^-1 u_j: quadratic (model 1) or linear (model 2)."""
    return (1 + products).square() if model == 1 else products


def bayesian_quadrature(
    scores: Float[Tensor, "M n"],
    returns: Float[Tensor, " M"],
    fisher: Fisher,
    model: Model,
    noise: float,
) -> GradientPosterior:
    """Equations (model 1) and (model 2).

    Args:
        scores: one score vector for each trajectory.
        returns: return of each trajectory.
        fisher: the Fisher matrix.
        model: 1 or 2.
        noise: variance of the measurement noise, above 0.
    """
    scores, returns = scores.double(), returns.double()
    products = fisher.products(scores)
    factor = torch.linalg.cholesky(fisher_kernel(products, model) + noise * torch.eye(len(scores)).to(scores))
    if model == 1:
        b = 1 + products.diagonal()
        solved = torch.cholesky_solve(b[:, None], factor)[:, 0]
        left = 1 + scores.shape[1] - b @ solved
        return GradientPosterior(scores, returns * solved, lambda: left * _eye(scores), None)
    weights = torch.cholesky_solve(returns[:, None], factor)[:, 0]
    return GradientPosterior(scores, weights, fisher.matrix, torch.cholesky_inverse(factor))


def sparse_quadrature(
    scores: Float[Tensor, "M n"],
    returns: Float[Tensor, " M"],
    fisher: Fisher,
    model: Model,
    noise: float,
    tau: float,
) -> tuple[GradientPosterior, Sparsification]:
    """Equation (sparse): no kernel matrix of all pairs is made. Arguments as for `bayesian_quadrature` and `sparsify`."""
    scores, returns = scores.double(), returns.double()
    solved = fisher.solve(scores)
    own = (scores * solved).sum(-1)

    def kernel(members: list[int], point: int) -> Tensor:
        return fisher_kernel(scores[members] @ solved[point], model)

    kept = sparsify(kernel, fisher_kernel(own, model), tau)
    weighting = _sparse_weighting(kept, noise)
    if model == 1:
        b = 1 + own[kept.members]
        over_all = b @ weighting
        left = 1 + scores.shape[1] - over_all @ kept.projections @ b
        return GradientPosterior(scores, returns * over_all, lambda: left * _eye(scores), None), kept
    weights = torch.zeros_like(returns).index_put((kept.members,), weighting @ returns)
    reduction = torch.zeros(len(scores), len(scores), dtype=torch.float64)
    reduction[kept.members[:, None], kept.members] = weighting @ kept.projections
    return GradientPosterior(scores, weights, fisher.matrix, reduction), kept


def _sparse_weighting(kept: Sparsification, noise: float) -> Float[Tensor, "m M"]:
    """P, by the Cholesky factor L of the dictionary: L^-T (L^T A^T A L + noise I)^-1 L^T A^T."""
    projected = kept.projections @ kept.factor
    inner = projected.T @ projected
    factor = torch.linalg.cholesky(inner + noise * torch.eye(len(inner), dtype=torch.float64))
    return torch.linalg.solve_triangular(kept.factor.T, torch.cholesky_solve(projected.T, factor), upper=True)


def _eye(scores: Tensor) -> Tensor:
    return torch.eye(scores.shape[1], dtype=torch.float64)


@register("bayesian")
class BayesianQuadrature(Advantage):
    """Weights of the trajectories by Bayesian quadrature, equations (model 1), (model 2) and (sparse), times M."""

    requires = frozenset({"scores"})

    class Config(FisherConfig):
        """Options of the Gaussian process."""

        model: Model = 1
        """What the process models: 1 return times score, 2 the return alone."""
        noise: float = Field(1e-3, ge=1e-6)
        """Variance of the measurement noise, in units of the kernel."""
        baseline: Literal["none", "mean", "group_mean"] = "mean"
        """What is subtracted from the returns before (paper: none)."""
        tau: float | None = Field(None, ge=0)
        """Threshold of the online sparsification, in units of the kernel; None keeps every trajectory."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        c = self.config
        self.fisher = FisherEstimator(c.ridge, c.memory, c.rank)

    def posterior(self, batch: Batch) -> GradientPosterior:
        """What is believed of the gradient, given the trajectories that have decisions."""
        c, used = self.config, batch.mask.any(-1)
        scores, returns = batch.scores[used, 0].double(), self._returns(batch)[used]
        fisher = self.fisher(scores, len(scores))
        if c.tau is None:
            return bayesian_quadrature(scores, returns, fisher, c.model, c.noise)
        return sparse_quadrature(scores, returns, fisher, c.model, c.noise, c.tau)[0]

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        used = batch.mask.any(-1)
        weights = torch.zeros(len(batch), 1, dtype=torch.float64)
        if bool(used.any()):
            weights[used, 0] = self.posterior(batch).weights * used.sum()
        return weights

    def observe(self, batch: Batch) -> None:
        scores = batch.scores[batch.mask.any(-1), 0]
        self.fisher.observe(scores, len(scores))

    def _returns(self, batch: Batch) -> Float[Tensor, " N"]:
        returns, used = batch.outcome(), batch.mask.any(-1)
        if self.config.baseline == "none" or not bool(used.any()):
            return returns
        group = batch.group if self.config.baseline == "group_mean" else torch.zeros_like(batch.group)
        centred = torch.zeros_like(returns)
        centred[used] = Groups.of(group[used]).centre(returns[used])
        return centred


def _method(optimizer: Ascent) -> Method:
    surrogate = ScoreFunction(aggregation="sequence_mean_token_sum")
    return Method(advantage=BayesianQuadrature(), surrogate=surrogate, optimizer=optimizer)


@register_recipe("bpg")
def bpg() -> Method:
    """Bayesian policy gradient: the posterior mean of model 1, plain ascent."""
    return _method(Ascent())


@register_recipe("bpg-natural")
def bpg_natural() -> Method:
    """Bayesian natural policy gradient: the posterior mean of model 1 in the Fisher metric."""
    return _method(Ascent(natural=True))
