"""G2RPO."""

import torch

from polopt.functional.groups import Groups
from polopt.methods.advantage.g2rpo import (
    entropy_band,
    gaussian_rank_advantage,
    length_envelope,
    normal_scores,
    task_entropy,
)  # fmt: skip
from tests.vectors.adapters.common import Values

TIE_TOL = 1e-9


def scores(inputs: Values, params: Values) -> Values:
    """Normal scores of one sample, or of each row of samples."""
    samples = inputs["samples"].double()
    rows = samples if samples.dim() == 2 else samples[None]
    alone = Groups.of(torch.zeros(rows.shape[1], dtype=torch.int64))
    found = torch.stack([normal_scores(row, alone, params.get("tie_tol", TIE_TOL)) for row in rows])
    return {"scores": found if samples.dim() == 2 else found[0]}


def advantage(inputs: Values, params: Values) -> Values:
    """Both stages."""
    rewards = inputs["rewards"].double()
    rewards = rewards if rewards.dim() == 2 else rewards[:, None]
    first, found = gaussian_rank_advantage(
        rewards, inputs["group"], inputs["task"], params.get("tie_tol", TIE_TOL)
    )
    return {"stage1": first, "advantage": found if params.get("two_stage", True) else first}


def envelope(inputs: Values, params: Values) -> Values:
    """Length reward."""
    knots = [params[name] for name in ("min_start", "peak_start", "peak_end", "max_end")]
    return {"score": length_envelope(inputs["lengths"].double(), *knots)}


def shaping(inputs: Values, params: Values) -> Values:
    """Entropy band with either estimator, and its derivative with respect to what that reads."""
    read = "entropy" if params.get("estimator") == "full" else "logp"
    leaf = inputs[read].clone().requires_grad_()
    mean = task_entropy(leaf if read == "entropy" else -leaf, inputs["mask"].bool(), inputs["task"])
    loss = params["coef"] * entropy_band(mean, params["low"], params["high"])
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), f"grad_{read}": gradient, "task_entropy": mean.detach()}


OPERATIONS = {
    "ot_normal_scores": scores,
    "g2rpo_advantage": advantage,
    "gs_gdpo_advantage": advantage,
    "length_envelope": envelope,
    "entropy_shaping_loss": shaping,
}
