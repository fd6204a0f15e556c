"""Batches and losses that the comparisons share."""

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.method import Method
from polopt.methods.classics.dr_grpo import GroupCentred
from polopt.parts import Regularizer, Surrogate
from polopt.testing import TinyActor, random_batch
from polopt.testing.compare import fill_outside
from polopt.testing.subject import Subject, prepared

LIMITS: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
SEEDS = range(4)


def other_library(module: str) -> ModuleType:
    """A module of another library; the tests of this file are skipped where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module}: {error}", allow_module_level=True)


def ragged_batch(
    seed: int, groups: tuple[int, ...] = (4, 4, 4), requires: frozenset[str] = frozenset()
) -> Batch:
    """A prepared batch with every trajectory of at least one decision, and zeros outside the mask."""
    batch = fill_outside(random_batch(requires, seed=seed, groups=groups, rewards="graded"), 0.0)
    batch.mask[:, 0] = True
    order = torch.argsort(batch.group, stable=True)  # others want the trajectories of a group side by side
    return batch[order]


def evaluate(batch: Batch) -> tuple[Tensor, Tensor]:
    """The current policy's log-probabilities and entropies, leaves, 0 outside the mask."""
    with torch.no_grad():
        found = TinyActor(0, noise=0.15).evaluate(batch, frozenset({"logp", "entropy"})).where(batch.mask)
    return found.logp.requires_grad_(), found.entropy.requires_grad_()


def our_loss(
    surrogate: Surrogate, batch: Batch, regularizers: tuple[Regularizer, ...] = ()
) -> tuple[Tensor, Tensor, Batch]:
    """Loss and gradient of ours, and the prepared batch with its advantages (reward less the group's mean)."""
    method = Method(advantage=GroupCentred(), surrogate=surrogate, regularizers=regularizers)
    subject = Subject(method)
    batch = prepared(method, batch)
    step = subject.objective(method, batch)
    return step.loss, step.gradient["logp"], batch
