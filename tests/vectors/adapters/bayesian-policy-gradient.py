"""BPG and BAC."""

import torch
from torch import Tensor

from polopt.methods.gradient import bayesian_ac as ac
from polopt.methods.gradient import bayesian_pg as pg
from polopt.methods.gradient.fisher import Fisher, fisher_update
from polopt.methods.gradient.gptd import gptd, sparse_gptd
from tests.vectors.adapters.common import Values


def fisher_of(inputs: Values, rows: Tensor, count: int, ridge: float) -> Fisher:
    """The matrix that is given, else the mean of the rows' outer products plus a ridge."""
    if inputs.get("fisher") is not None:
        return Fisher.of(inputs["fisher"].double())
    return Fisher.of_rows(rows.double() / count**0.5, ridge)


def gradient(found: pg.GradientPosterior, fisher: Fisher) -> Values:
    """Mean, covariance and natural gradient."""
    return {
        "gradient_mean": found.mean,
        "gradient_cov": found.covariance,
        "natural_gradient": fisher.solve(found.mean[None])[0],
        "fisher_used": fisher.matrix(),
    }


def trajectories(inputs: Values, params: Values) -> Values:
    """Both models over all trajectories."""
    scores = inputs["scores"].double()
    fisher = fisher_of(inputs, scores, len(scores), params.get("fisher_ridge", 0.0))
    model = params["model"]
    found = pg.bayesian_quadrature(
        scores, inputs["returns"].double(), fisher, model, params["noise_variance"]
    )
    kernel = pg.fisher_kernel(fisher.products(scores), model)
    return gradient(found, fisher) | {"kernel": kernel, "weights": found.weights}


def sparse_trajectories(inputs: Values, params: Values) -> Values:
    """Both models over a dictionary."""
    scores, returns = inputs["scores"].double(), inputs["returns"].double()
    fisher = fisher_of(inputs, scores, len(scores), params.get("fisher_ridge", 0.0))
    found, kept = pg.sparse_quadrature(
        scores, returns, fisher, params["model"], params["noise_variance"], params["tau"]
    )
    return gradient(found, fisher) | {
        "deltas": kept.distances,
        "dictionary": kept.members,
        "A": kept.projections,
        "weights": found.weights,
    }


def padded(values: Tensor | list) -> Tensor:
    """Ragged episodes as one tensor, zeros after their ends."""
    rows = list(values) if isinstance(values, Tensor) else [torch.tensor(row) for row in values]
    return torch.nn.utils.rnn.pad_sequence([row.double() for row in rows], batch_first=True)


def mask_of(inputs: Values) -> Tensor:
    """The decisions that are there."""
    if "mask" in inputs:
        return padded(inputs["mask"]).bool()
    lengths = torch.tensor([len(row) for row in inputs["rewards"]])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def kernel_arguments(params: Values) -> tuple[float, float, float]:
    """Scales of the two kernels, and the width of the state kernel."""
    return (
        params.get("state_kernel_scale", 1.0),
        params.get("fisher_kernel_scale", 1.0),
        params.get("state_lengthscale", 1.0),
    )


def decisions(inputs: Values, params: Values) -> tuple[Tensor, Tensor, Tensor, Tensor, Fisher]:
    """Rewards, mask, scores and states of the decisions, and the Fisher matrix."""
    mask, all_scores = mask_of(inputs), padded(inputs["scores"])
    rows = ac.discounted_rows(all_scores, mask, params["gamma"])
    fisher = fisher_of(inputs, rows, int(mask.any(-1).sum()), params.get("fisher_ridge", 1e-6))
    return padded(inputs["rewards"]), mask, all_scores[mask], padded(inputs["states"])[mask], fisher


def actor_critic(inputs: Values, params: Values) -> Values:
    """The closed form."""
    rewards, mask, scores, states, fisher = decisions(inputs, params)
    c_state, c_fisher, width = kernel_arguments(params)
    kernel = ac.decision_kernel(scores, states, fisher, c_state, c_fisher, width)
    found = gptd(rewards, mask, kernel, params["gamma"], params["noise_variance"])
    alpha = torch.zeros(mask.shape, dtype=torch.float64)
    alpha[mask] = found.alpha
    return gradient(found.gradient(scores, fisher, c_fisher), fisher) | {
        "alpha": alpha,
        "q_mean_at_data": kernel @ found.alpha,
    }


def sparse_actor_critic(inputs: Values, params: Values) -> Values:
    """The recursion."""
    rewards, mask, scores, states, fisher = decisions(inputs, params)
    c_state, c_fisher, width = kernel_arguments(params)
    kernel, own = ac.kernel_by_number(scores, states, fisher, c_state, c_fisher, width)
    found, members = sparse_gptd(
        rewards, mask, kernel, own, params["gamma"], params["noise_variance"], params["nu"]
    )
    return gradient(found.gradient(scores[members], fisher, c_fisher), fisher) | {
        "dictionary": members,
        "dictionary_size": len(members),
        "alpha_dictionary": found.alpha,
    }


def fisher_recursion(inputs: Values, params: Values) -> Values:
    """The running mean and its inverse, a prior ridge counted as the first sample."""
    ridge = next(params[name] for name in ("ridge", "fisher_ridge", "lambda", "prior") if name in params)
    eye = torch.eye(inputs["scores"].shape[-1], dtype=torch.float64)
    fisher, inverse = ridge * eye, eye / ridge
    for number, score in enumerate(inputs["scores"].double(), 1):
        fisher, inverse = fisher_update(fisher, inverse, score, number)
    names: dict[str, Tensor] = {"fisher": fisher, "fisher_used": fisher, "G": fisher}
    for name in ("fisher_inverse", "inverse", "fisher_inv", "G_inverse", "G_inv"):
        names[name] = inverse
    return names


OPERATIONS = {
    "bpg": trajectories,
    "bpg_sparse": sparse_trajectories,
    "bac": actor_critic,
    "bac_sparse": sparse_actor_critic,
    "fisher_recursion": fisher_recursion,
}
