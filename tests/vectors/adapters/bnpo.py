"""BNPO."""

from polopt.functional.groups import Groups
from polopt.methods.advantage.bnpo import bnpo_advantage, fit
from polopt.methods.classics.ppo import PPOClip
from tests.vectors.adapters.common import Values, batch_of, first_rows, loss_and_gradient, set_advantages


def advantage(inputs: Values, params: Values) -> Values:
    """Advantage and the fitted normaliser of one reward."""
    low, high, cap = params["r_min"], params["r_max"], params["weight_max"]
    rewards, groups = inputs["rewards"].double(), Groups.of(inputs["group"])
    rows = first_rows(inputs["group"])
    plural = rows[groups.broadcast(groups.size)[rows] > 1]
    found = fit((rewards - low) / (high - low), groups, cap)
    return {
        "advantage": bnpo_advantage(rewards[:, None], inputs["group"], low, high, cap),
        "alpha": found.alpha, "beta": found.beta, "group_mean": groups.broadcast(found.rate)[plural],
        "group_weight": groups.broadcast(found.weight)[rows],
    }  # fmt: skip


def multi(inputs: Values, params: Values) -> Values:
    """Advantage of several rewards."""
    low, high, cap = params.get("r_min", 0.0), params.get("r_max", 1.0), params.get("weight_max", 1e6)
    return {"advantage": bnpo_advantage(inputs["rewards"].double(), inputs["group"], low, high, cap)}


def loss(inputs: Values, params: Values) -> Values:
    """Dual-clipped PPO loss of the released run."""
    batch = batch_of(inputs)
    found = bnpo_advantage(batch.rewards, batch.group)
    set_advantages(batch, found)
    clip = {key: params[key] for key in ("clip_low", "clip_high", "dual_clip")}
    surrogate = PPOClip(aggregation="sequence_mean_token_sum", **clip)
    return loss_and_gradient(surrogate, batch, inputs["logp"]) | {"advantage": found}


OPERATIONS = {"bnpo_advantage": advantage, "bnpo_advantage_multi": multi, "bnpo_loss": loss}
