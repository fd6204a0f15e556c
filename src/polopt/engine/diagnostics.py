"""What every run reports, whatever its method and domain: plain numbers by name."""

import resource
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.divergence import kl_estimate
from polopt.functional.groups import Groups
from polopt.functional.masked import masked_mean
from polopt.functional.ratio import log_ratio
from polopt.parts import Surrogate

Metrics = dict[str, float]


def describe_rollout(batch: Batch, reward_names: tuple[str, ...]) -> Metrics:
    """Rewards, lengths, entropy and sampler mismatch of an iteration's batch as it was collected."""
    known = batch.rewards.isfinite().any(-1)
    if batch.step_rewards is not None:
        known |= batch.mask.any(-1)
    outcome = batch.outcome()[known]
    metrics = {
        "reward": _mean(outcome),
        "reward/std": float(outcome.std()) if len(outcome) > 1 else 0.0,
        "reward/missing": _mean(~known),
        "length": _mean(batch.lengths),
        "length/max": float(batch.lengths.max()) if len(batch) else 0.0,
        "rows": float(len(batch)),
    }
    for name, column in zip(reward_names, batch.rewards.unbind(-1), strict=True):
        if batch.step_rewards is None:
            metrics[f"reward/{name}"] = _mean(column[column.isfinite()])
    if batch.truncated is not None:
        metrics["length/truncated"] = _mean(batch.truncated)
    if batch.old_entropy is not None:
        metrics["entropy"] = float(masked_mean(batch.old_entropy, batch.mask))
    return metrics


def describe_advantages(batch: Batch) -> Metrics:
    """What the prepared batch teaches: advantage scale, groups without gradient, share of selected decisions."""
    assert batch.advantages is not None and batch.weights is not None
    if not len(batch):
        return {"advantage/std": 0.0, "groups/zero_gradient": 1.0, "selected": 0.0}
    silent = Groups.of(batch.group).max((batch.advantages * batch.weights).abs().amax(-1)) == 0
    chosen = batch.advantages[batch.mask]
    return {
        "advantage/std": float(chosen.std()) if len(chosen) > 1 else 0.0,
        "groups/zero_gradient": _mean(silent),
        "selected": _mean(batch.weights[batch.mask] > 0),
    }


def describe_update(evaluations: Sequence[Evaluation], batch: Batch, surrogate: Surrogate) -> Metrics:
    """Ratios and divergences of the evaluated trajectories of an epoch's minibatches, each as it was before its step.

    `ess` is the effective sample size of the ratios as a share of the decisions: (sum r)^2 / (n sum r^2).

    Args:
        evaluations: of each minibatch.
        batch: the trajectories of all of them, in their order.
        surrogate: says which decisions it cut off.
    """
    fields = [evaluation.tensors() for evaluation in evaluations]
    evaluation = Evaluation(**{name: torch.cat([found[name] for found in fields]) for name in fields[0]})
    mask = batch.mask
    difference = log_ratio(evaluation.logp, batch.old_logp, mask)
    ratio = difference.exp()[mask].double()
    if not len(ratio):
        return {}
    metrics = {
        "ratio/mean": float(ratio.mean()),
        "ratio/variance": float(ratio.var(correction=0)),
        "ratio/max": float(ratio.max()),
        "ess": float(ratio.sum().square() / (len(ratio) * ratio.square().sum())),
        "kl/old": float(masked_mean(kl_estimate(evaluation.logp, batch.old_logp, mask, "k3"), mask)),
    }
    clipped = surrogate.clipped(evaluation, batch)
    if clipped is not None:
        metrics["clipped"] = _mean(clipped[mask])
    if evaluation.entropy is not None:
        metrics["entropy/update"] = float(masked_mean(evaluation.entropy, mask))
    if batch.ref_logp is not None:
        metrics["kl/reference"] = float(
            masked_mean(kl_estimate(evaluation.logp, batch.ref_logp, mask, "k3"), mask)
        )
    if batch.sampler_logp is not None:
        gap = (batch.old_logp - batch.sampler_logp)[mask]
        metrics |= {"mismatch/mean": float(gap.abs().mean()), "mismatch/max": float(gap.abs().max())}
    return metrics


def describe_off_policy(evaluation: Evaluation) -> Metrics:
    """Entropy and critics at decisions drawn anew, means over a minibatch as they were before its step."""
    found = {}
    if evaluation.fresh_logp is not None:
        found["entropy/update"] = -_mean(evaluation.fresh_logp)
    if evaluation.fresh_q is not None:
        found["q"] = _mean(evaluation.fresh_q)
    return found


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0


def average(steps: list[Metrics]) -> Metrics:
    """Mean of each metric over the steps that report it; the largest for names that end in `max`."""
    names = dict.fromkeys(name for step in steps for name in step)
    collected = {
        name: torch.tensor([s[name] for s in steps if name in s], dtype=torch.float64) for name in names
    }
    return {name: float(v.max() if name.endswith("max") else v.mean()) for name, v in collected.items()}
