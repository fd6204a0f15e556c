"""Knapsack RL."""

import torch

from polopt.methods.allocation.knapsack_rl import (
    Record,
    allocate,
    information_gain,
    mixed_probability,
    success_rate,
    value,
)
from tests.vectors.adapters.common import Values


def values(inputs: Values, params: Values) -> Values:
    """Value table."""
    n, p = inputs["n"], inputs["p"].double()
    return {"prob_nonzero": mixed_probability(n, p), "info_gain": information_gain(p), "value": value(n, p)}


def tracker(inputs: Values, params: Values) -> Values:
    """Record of one prompt."""
    valid, p_hat, seen = success_rate(inputs["reward_batches"], params["window"], params["min_count"])
    return {"valid": valid, "p_hat": p_hat, "count": seen}


def allocation(inputs: Values, params: Values) -> Values:
    """Integer budget of each prompt."""
    rates, valid = inputs["p_hat"].double(), inputs["valid"].tolist()
    records = [Record(bool(known), rate, 0) for known, rate in zip(valid, rates.tolist(), strict=True)]
    found = allocate(
        records, params.get("total", params["n"] * len(records)), params["n"], low=params["n_low"], up=params["n_up"],
        negative=params["n_negative"], positive=params["n_positive"], alpha=params["alpha"],
        fallback=params["fallback"], variant=params["variant"], kind=params.get("cost", "probability"),
    )  # fmt: skip
    worth = value(found.budget, rates).sum()
    return {"budget": found.budget, "fallback": torch.tensor(found.fallback), "value": worth}


OPERATIONS = {"value": values, "track": tracker, "allocate": allocation}
