"""OBLR-PO."""

import torch

from polopt.functional.masked import masked_sum
from polopt.methods.advantage.oblr_po import SignalToNoise, optimal_baseline, score_sqnorm
from tests.vectors.adapters.common import Values


def baseline(inputs: Values, params: Values) -> Values:
    """Optimal baseline and advantage."""
    rewards = inputs["rewards"].double()
    found = optimal_baseline(rewards, inputs["group"], inputs["score_sqnorm"], params["leave_one_out"])
    return {"baseline": found, "advantage": rewards - found}


def rate(inputs: Values, params: Values) -> Values:
    """Signal, noise and learning rate, iteration by iteration."""
    optimizer = SignalToNoise(ema=params["ema"], lr_min_share=params["lr_min"] / params["lr_max"])
    found: dict[str, list[float]] = {"signal": [], "noise": [], "lr": []}
    for gradients in inputs["grads"]:
        g = torch.as_tensor(gradients, dtype=torch.float64)
        square_sum, mean_square = g.square().sum(), g.mean(0).square().sum()
        share = optimizer.rate_share(square_sum, mean_square, len(g))
        signal, noise = optimizer.corrected()
        for name, number in (("signal", signal), ("noise", noise), ("lr", share * params["lr_max"])):
            found[name].append(float(number))
    return found


def proxy(inputs: Values, params: Values) -> Values:
    """Squared score norm in logit space."""
    each = score_sqnorm(inputs["probs"], inputs["actions"])
    return {"score_sqnorm": masked_sum(each, inputs["mask"].bool())}


OPERATIONS = {"optimal_baseline_advantage": baseline, "snr_learning_rate": rate, "logit_score_sqnorm": proxy}
