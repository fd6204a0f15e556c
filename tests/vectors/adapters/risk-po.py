"""RiskPO."""

import torch

from polopt.methods.advantage.risk_po import BundleClip, mixed_value_at_risk, track
from polopt.methods.advantage.risk_po_released import released_advantage
from tests.vectors.adapters.common import Values, batch_of, first_rows, loss_and_gradient, set_advantages


def mvar(inputs: Values, params: Values) -> Values:
    """Advantage of bundle scores."""
    scores = inputs["bundle_scores"].double()
    return {"advantage": mixed_value_at_risk(scores, inputs["q_alpha"], inputs["q_beta"], params["omega"])}


def tracking(inputs: Values, params: Values) -> Values:
    """Quantiles after each batch of scores."""
    quantiles, found = inputs["q"].double(), []
    for scores in inputs["score_batches"]:
        quantiles = track(
            quantiles, inputs["levels"].double(), torch.as_tensor(scores).double(), params["lr"]
        )
        found.append(quantiles)
    return {"q_after_each": torch.stack(found)}


def released(inputs: Values, params: Values) -> Values:
    """The released form: the k-th answers of a set's prompts are a bundle."""
    group, sets = inputs["group"], inputs["bundle"]
    place = torch.stack([(group[:row] == group[row]).sum() for row in range(len(group))])
    of_first = first_rows(sets).tolist()
    rank = {int(sets[row]): number for number, row in enumerate(of_first)}
    bundle = torch.tensor([rank[int(s)] * len(group) + int(p) for s, p in zip(sets, place, strict=True)])
    known = inputs.get("q_alpha") is not None
    names = ("alpha", "beta", "w_mix", "credit", "natural_baseline", "norm_by_std", "eps")
    scores, advantage = released_advantage(
        inputs["rewards"].double(), group, bundle, sets,
        quantiles=torch.tensor([float(inputs["q_alpha"]), float(inputs["q_beta"])]) if known else None,
        upper_weight=params.get("upper_weight"),
        **{name: params[name] for name in names},
    )  # fmt: skip
    return {"bundle_scores": scores, "advantage": advantage}


def loss(inputs: Values, params: Values) -> Values:
    """Sequence-clipped loss of bundles."""
    batch, bundle = batch_of(inputs), inputs["bundle_index"]
    scores = inputs["bundle_scores"].double()
    advantage = mixed_value_at_risk(scores, inputs["q_alpha"], inputs["q_beta"], params["omega"])[bundle]
    set_advantages(batch, advantage)
    batch.set_signal("bundle", bundle)
    part = BundleClip(clip_low=params["clip_low"], clip_high=params["clip_high"])
    return loss_and_gradient(part, batch, inputs["logp"]) | {"advantage": advantage}


OPERATIONS = {
    "mvar_advantage": mvar,
    "quantile_track": tracking,
    "riskpo_advantage_code": released,
    "riskpo_loss": loss,
}
