"""CAPO."""

import torch

from polopt.methods.allocation.capo import AdamConstants, Moments, accepted, predicted_shifts, updated_moments
from polopt.methods.classics.ppo import PPOClip
from tests.vectors.adapters.common import Values, batch_of, loss_and_gradient


def moments_of(inputs: Values, rows: int) -> Moments:
    """Adam's state of the inputs; empty if there is none."""
    place = torch.full((rows,), -1)
    if "m" not in inputs:
        empty = torch.zeros(0, inputs["hidden"].shape[-1], dtype=torch.float64)
        return Moments(place, empty, empty, 0)
    place[inputs["moment_rows"]] = torch.arange(len(inputs["moment_rows"]))
    return Moments(place, inputs["m"], inputs["v"], int(inputs["t"]))


def curvature(inputs: Values, params: Values) -> Values:
    """Shifts, accepted tokens, moments after the update, and the loss on what is accepted."""
    mask = inputs["mask"].bool()
    advantages = inputs["advantages"][:, None].expand(mask.shape)
    tensors = [inputs[name] for name in ("hidden", "logits", "row_ids", "action")] + [advantages]
    adam = params["optimizer_model"] == "adam"
    rows = int(max(inputs["row_ids"].max(), *(inputs.get("moment_rows", torch.zeros(1)).tolist()))) + 1
    state = moments_of(inputs, rows) if adam else None
    constants = AdamConstants(params["beta1"], params["beta2"], params["eps"]) if adam else AdamConstants()
    shifts = predicted_shifts(*(t[mask] for t in tensors), params["lr"], state, constants)
    keep = accepted(shifts, params["tau_objective"], params["tau_policy"], params["symmetric"])

    def placed(values: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(mask.shape, dtype=torch.float64)
        whole[mask] = values.double()
        return whole

    found: Values = {
        "objective_shift": placed(shifts.objective), "policy_shift": placed(shifts.policy), "accept": placed(keep),
    }  # fmt: skip
    if state is not None:
        chosen = placed(keep).bool()
        new = updated_moments(*(t[chosen] for t in tensors), state, constants)
        known = (new.place >= 0).nonzero()[:, 0]
        at = new.place[known]
        found |= {
            "moment_rows": known,
            "m_after": new.first[at],
            "v_after": new.second[at],
            "t_after": new.steps,
        }
    if "logp" in inputs:
        batch = batch_of(inputs)
        batch.weights = placed(keep)
        part = PPOClip(
            aggregation="sequence_mean", denominator="selected_decisions", clip_low=params["clip"],
            clip_high=params["clip"],
        )  # fmt: skip
        found |= loss_and_gradient(part, batch, inputs["logp"])
    return found


OPERATIONS = {None: curvature}
