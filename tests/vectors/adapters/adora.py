"""ADORA."""

from polopt.functional.groups import Groups
from polopt.methods.advantage.adora import advantageous, group_weights
from polopt.methods.classics.grpo import group_standardized
from tests.vectors.adapters.common import Values, first_rows


def advantage(inputs: Values, params: Values) -> Values:
    """Labels, weights and weighted group-normalised advantages."""
    groups, rewards = Groups.of(inputs["group"]), inputs["rewards"].double()
    label = advantageous(
        rewards, inputs["length"], groups, criterion=params["criterion"], threshold=params["success_threshold"],
        max_length=params["max_fail_length"], no_success=params["no_success"], no_failure=params["no_failure"],
        max_success_rate=params["tau"],
    )  # fmt: skip
    weight = groups.broadcast(group_weights(label, params["mode"], params["weight"]))
    base = group_standardized(rewards, inputs["group"], params["eps"])
    rows = first_rows(inputs["group"])
    return {"tas": groups.broadcast(label)[rows], "weight": weight, "advantage": weight * base}


OPERATIONS = {"adora_advantage": advantage}
