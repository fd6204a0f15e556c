"""COPO."""

from polopt.functional.groups import Groups
from polopt.methods.advantage.copo import (
    BlendedClip,
    LocalGlobal,
    answer_entropy,
    global_reward,
    prompt_standardized,
)
from polopt.methods.classics.grpo import group_standardized
from tests.vectors.adapters.common import Values, attach_signals, batch_of, first_rows, loss_and_gradient


def advantages(inputs: Values, params: Values) -> Values:
    """Both advantages and what they are made of."""
    groups, rewards = Groups.of(inputs["group"]), inputs["rewards"].double()
    entropy = answer_entropy(inputs["outcome"], groups)
    reward = global_reward(rewards, entropy, groups, params["consistency_coef"])
    return {
        "local": group_standardized(rewards, inputs["group"], params["eps"]),
        "global": groups.broadcast(prompt_standardized(reward, params["eps"])),
        "entropy_bits": groups.broadcast(entropy),
        "global_reward_per_group": groups.broadcast(reward)[first_rows(inputs["group"])],
    }


def loss(inputs: Values, params: Values) -> Values:
    """Blended loss, gradient and the weight of the local one."""
    batch = batch_of(inputs)
    batch.answer = inputs["outcome"]
    options = {name: params[name] for name in ("mode", "gamma", "rho")}
    attach_signals(LocalGlobal(consistency=params["consistency_coef"], **options), batch)
    part = BlendedClip(**{name: params[name] for name in ("clip_low", "clip_high", "dual_clip")})
    return loss_and_gradient(part, batch, inputs["logp"]) | {"local_weight": batch.signal("local_weight")}


OPERATIONS = {"copo_advantages": advantages, "copo_loss": loss}
