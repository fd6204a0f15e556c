"""The Fisher matrix of a policy, from score vectors: estimated, remembered and solved with at any number of parameters."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from polopt.errors import ConfigError
from polopt.settings import Settings

SINGULAR = 1e-14
"""Share of the largest eigenvalue below which a Fisher matrix counts as singular."""


@dataclass(frozen=True)
class Fisher:
    """A Fisher matrix G = V diag(s) V^T + ridge I of n parameters, known by r <= n directions V, float64."""

    directions: Float[Tensor, "n r"]
    values: Float[Tensor, " r"]
    ridge: float

    @classmethod
    def of(cls, matrix: Float[Tensor, "n n"]) -> Self:
        """A matrix that is given.

        Raises:
            ConfigError: it is not positive definite.
        """
        values, directions = torch.linalg.eigh(matrix.double())
        return cls(directions, values, 0.0)._checked()

    @classmethod
    def of_rows(cls, rows: Float[Tensor, "r n"], ridge: float) -> Self:
        """rows^T rows + ridge I.

        Raises:
            ConfigError: it is singular: too few rows and no ridge.
        """
        values, directions = second_moment(rows)
        return cls(directions, values, ridge)._checked()

    def solve(self, vectors: Float[Tensor, "M n"]) -> Float[Tensor, "M n"]:
        """G^-1 times each vector, float64."""
        vectors = vectors.double()
        along = vectors @ self.directions
        solved = (along / (self.values + self.ridge)) @ self.directions.T
        if self._complete:
            return solved
        return solved + (vectors - along @ self.directions.T) / self.ridge

    def matrix(self) -> Float[Tensor, "n n"]:
        """G, written out."""
        eye = torch.eye(len(self.directions), dtype=torch.float64, device=self.values.device)
        return (self.directions * self.values) @ self.directions.T + self.ridge * eye

    def products(self, vectors: Float[Tensor, "M n"]) -> Float[Tensor, "M M"]:
        """The Fisher kernel u_i^T G^-1 u_j of all pairs."""
        products = vectors.double() @ self.solve(vectors).T
        return (products + products.T) / 2

    @property
    def _complete(self) -> bool:
        return self.directions.shape[0] == self.directions.shape[1]

    def _checked(self) -> Self:
        whole = self.values + self.ridge
        known = self._complete and bool((whole > SINGULAR * whole.max()).all())
        if len(self.directions) and not known and self.ridge <= 0:
            raise ConfigError("fisher: the matrix is not positive definite; add a ridge above 0")
        return self


def second_moment(rows: Float[Tensor, "r n"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """Eigenvalues, ascending, and orthonormal directions of rows^T rows; at most as many as rows or columns, float64."""
    rows = rows.double()
    basis = None
    if len(rows) < rows.shape[1]:
        basis, coordinates = torch.linalg.qr(rows.T)
        rows = coordinates.T
    values, directions = torch.linalg.eigh(rows.T @ rows)
    return values.clamp(min=0), directions if basis is None else basis @ directions


def fisher_update(
    fisher: Float[Tensor, "n n"], inverse: Float[Tensor, "n n"], score: Float[Tensor, " n"], count: int
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """The running mean of u u^T and its inverse (Sherman-Morrison) with one score more.

    Args:
        fisher: mean over `count` samples; a prior ridge I is the first of them.
        inverse: of `fisher`.
        score: the new sample.
        count: samples so far, at least 1.
    """
    v = inverse @ score
    mean = (count * fisher + torch.outer(score, score)) / (count + 1)
    return mean, (count + 1) / count * (inverse - torch.outer(v, v) / (count + score @ v))


class FisherEstimator(nn.Module):
    """The second moment of rows over this and earlier iterations, plus a ridge.

    Args:
        ridge: added to the diagonal.
        memory: weight of the earlier iterations' sums relative to this one's, per iteration; 0 forgets them.
        rank: leading directions of the past that are kept.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, ridge: float, memory: float, rank: int) -> None:
        super().__init__()
        self.ridge, self.memory, self.rank = ridge, memory, rank
        self.supplied: Fisher | None = None
        self.register_buffer("rows", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def supply(self, matrix: Float[Tensor, "n n"]) -> None:
        """Use a known Fisher matrix from now on."""
        self.supplied = Fisher.of(matrix)

    def forward(self, rows: Float[Tensor, "r n"], count: int) -> Fisher:
        """The estimate with rows^T rows over `count` samples added to the past."""
        if self.supplied is not None:
            return self.supplied
        total = self.memory * self.count + count
        return Fisher.of_rows(self._joined(rows) / total.clamp(min=1).sqrt(), self.ridge)

    def observe(self, rows: Float[Tensor, "r n"], count: int) -> None:
        """Remember an iteration."""
        if not self.memory or not len(rows):
            return
        values, directions = second_moment(self._joined(rows))
        self.rows = (values.sqrt() * directions)[:, -self.rank :].T.contiguous()
        self.count = self.memory * self.count + count

    def _joined(self, rows: Tensor) -> Tensor:
        past = self.rows.to(rows.device)
        return torch.cat([self.memory**0.5 * past, rows.double()]) if past.numel() else rows.double()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.rows = torch.empty_like(state_dict[prefix + "rows"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FisherConfig(Settings):
    """How the Fisher matrix is estimated."""

    ridge: float = Field(1e-3, gt=0)
    """Added to the diagonal of the Fisher matrix, in its units (squared score)."""
    memory: float = Field(0.9, ge=0, lt=1)
    """Weight of the earlier iterations' scores relative to this one's, per iteration; 0: this sample alone."""
    rank: int = Field(128, ge=1)
    """Leading directions of earlier iterations that are kept."""
