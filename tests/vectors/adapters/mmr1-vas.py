"""MMR1 / VAS."""

import torch

from polopt.methods.allocation.mmr1_vas import (
    distinct,
    diversity,
    edit_distance,
    momentum_update,
    outcome_variance,
    sampling_weights,
    self_bleu,
    split_counts,
    uniform_stream,
)  # fmt: skip
from tests.vectors.adapters.common import Values


def metrics(inputs: Values, params: Values) -> Values:
    """Diversity of one prompt's chains."""
    chains = inputs["sequences"]
    pairs = [(a, b) for i, a in enumerate(chains) for b in chains[:i]]
    return {
        "self_bleu_123": self_bleu(chains),
        "distinct_1": distinct(chains, 1),
        "distinct_3": distinct(chains),
        "mean_edit_distance": sum(edit_distance(a, b) for a, b in pairs) / max(1, len(pairs)),
        "tds_inverse_self_bleu": diversity(chains, "self_bleu_123"),
        "tds_edit": diversity(chains, "edit"),
    }


def score(inputs: Values, params: Values) -> Values:
    """Scores and weights of the pool."""
    rate = inputs["correct"].double().mean(-1)
    variance = outcome_variance(rate)
    vps = params["alpha"] * variance + params["beta"] * inputs["tds"]
    return {
        "pass_rate": rate,
        "ovs": variance,
        "vps": vps,
        "weight": sampling_weights(vps, params.get("normalize", "minmax"), params["eps"]),
    }


def momentum(inputs: Values, params: Values) -> Values:
    """Weights after a refresh."""
    return {"weight": momentum_update(inputs["old"], inputs["new"], params["momentum"])}


def mix(inputs: Values, params: Values) -> Values:
    """How a batch is split."""
    return dict(
        zip(("n_weighted", "n_uniform"), split_counts(int(inputs["batch"]), params["ratio"]), strict=True)
    )


def cursor(inputs: Values, params: Values) -> Values:
    """What the uniform stream gives, step by step."""
    count, position, drawn = split_counts(params["batch"], params["ratio"])[1], 0, []
    for _ in range(params["steps"]):
        taken, position = uniform_stream(inputs["permutation"], position, count)
        drawn.append(taken)
    return {"drawn": torch.stack(drawn)}


OPERATIONS = {
    "diversity": metrics,
    "score": score,
    "momentum": momentum,
    "mix": mix,
    "uniform_cursor": cursor,
}
