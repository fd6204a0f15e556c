"""D3S."""

import torch

from polopt.methods.allocation.d3s import schedule, select_samples, select_tokens
from polopt.methods.classics.ppo import PPOClip
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient


def samples(inputs: Values, params: Values) -> Values:
    """Selected rollouts."""
    advantages = inputs["advantages"].double()
    kept = select_samples(advantages, inputs["group"], params["n_per_group"], params["scope"])
    return {"selected": kept.nonzero()[:, 0], "variance": advantages[kept].var(correction=0)}


def tokens(inputs: Values, params: Values) -> Values:
    """Selected tokens of given rollouts."""
    mask, advantages = inputs["mask"].bool(), inputs["advantages"].double()
    rows = torch.zeros(len(mask), dtype=torch.bool).index_fill(0, inputs["selected"].long(), True)
    shaped = advantages[:, None] if advantages.dim() == 1 else advantages
    return {
        "token_mask": select_tokens(shaped, inputs["entropy"], mask & rows[:, None], params["keep_fraction"])
    }


def schedules(inputs: Values, params: Values) -> Values:
    """How much is kept at a share of the run."""
    bounds = [params[name] for name in ("n_init", "n_final", "k_init", "k_final")]
    return dict(
        zip(("n_per_group", "keep_fraction"), schedule(float(inputs["progress"]), *bounds), strict=True)
    )


def loss(inputs: Values, params: Values) -> Values:
    """Loss on the kept tokens."""
    batch, advantages = batch_of(inputs), inputs["advantages"].double()
    rows = select_samples(advantages, batch.group, params["n_per_group"], params["scope"])
    kept = select_tokens(
        advantages[:, None], inputs["entropy"], batch.mask & rows[:, None], params["keep_fraction"]
    )
    batch.weights = kept.double()
    part = PPOClip(denominator="selected", clip_low=params["clip_low"], clip_high=params["clip_high"])
    return loss_and_gradient(part, batch, inputs["logp"]) | {"token_mask": kept}


OPERATIONS = {"select_samples": samples, "select_tokens": tokens, "schedule": schedules, "loss": loss}
