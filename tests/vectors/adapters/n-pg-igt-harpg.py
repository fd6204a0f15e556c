"""N-PG-IGT and (N)-HARPG."""

from functools import partial

import torch
from torch import Tensor, nn

from polopt.batch import Evaluation
from polopt.engine.hessian import evaluation_product
from polopt.methods.gradient.gradient_average import GradientAverage
from polopt.methods.gradient.harpg import HARPG
from polopt.methods.gradient.n_pg_igt import NPGIGT, score_objective, step_weights
from tests.vectors.adapters.common import Values


def trajectories(inputs: Values, params: Values) -> Values:
    """Phi, its gradient and its Hessian's product with v, for each trajectory and their mean, of a tabular softmax."""
    theta = inputs["theta"].double().requires_grad_()
    mask, rows = inputs["mask"].bool(), range(len(inputs["mask"]))
    logprobs = theta.log_softmax(-1)
    states, actions = (torch.where(mask, inputs[name].double(), 0.0).long() for name in ("states", "actions"))
    logp = logprobs[states, actions]
    evaluation = Evaluation(logp).where(mask)
    weights = step_weights(inputs["rewards"].double(), mask, params["gamma"])
    phi = score_objective(logp, weights, mask)
    one = torch.eye(len(mask), dtype=torch.float64)

    def product(weights: Tensor) -> Tensor:
        with torch.enable_grad():
            return evaluation_product(
                evaluation, {"logp": weights}, mask, [theta], [inputs["v"].double()], retain_graph=True
            )[0]

    gradient = partial(torch.autograd.grad, phi, theta, retain_graph=True)
    return {
        "phi": phi.detach(),
        "step_weights": weights,
        "g_per_trajectory": torch.stack([gradient(one[i])[0] for i in rows]),
        "g_batch_mean": gradient(torch.full((len(mask),), 1 / len(mask), dtype=torch.float64))[0],
        "Bv_per_trajectory": torch.stack([product(weights * one[i][:, None]) for i in rows]),
        "Bv_batch_mean": product(weights / len(mask)),
    }


def gradient(x: Tensor, inputs: Values) -> Tensor:
    """Of the test function, which is ascended."""
    return inputs["b"].double() - inputs["A"].double() @ x - inputs["c"] * x**3


def curvature(x: Tensor, direction: list[Tensor], inputs: Values) -> list[Tensor]:
    """Its Hessian times a direction."""
    return [-inputs["A"].double() @ v - 3 * inputs["c"] * x**2 * v for v in direction]


def n_pg_igt(inputs: Values, params: Values) -> Values:
    """The recursion with exact gradients."""
    part = NPGIGT(eta=params.get("eta0", 1.0), eta_power=params.get("eta_power", 0.8))
    x = nn.Parameter(inputs["theta0"].double())
    optimizer = part.build([x], params["gamma0"])
    found: dict[str, list[Tensor]] = {name: [] for name in ("lookahead", "eta", "gamma", "d", "theta")}
    for _ in range(params["T"]):
        with part.at_rollout(optimizer):
            found["lookahead"].append(x.detach().clone())
            x.grad = -gradient(x.detach(), inputs)
        record(optimizer, found)
    return {name: torch.stack(values) for name, values in found.items()}


def harpg(inputs: Values, params: Values) -> Values:
    """The recursion with exact gradients and Hessians."""
    part = HARPG(eta=params.get("eta0", 1.0), normalized=params["normalized"])
    x = nn.Parameter(inputs["theta0"].double())
    optimizer = part.build([x], params["gamma0"])
    found: dict[str, list[Tensor]] = {name: [] for name in ("v", "eta", "gamma", "d", "theta")}
    for t in range(params["T"]):
        found["v"].append(torch.zeros_like(x))

        def product(direction: list[Tensor], t: int = t) -> list[Tensor]:
            found["v"][t] = curvature(x.detach(), direction, inputs)[0]
            return [-found["v"][t]]

        x.grad = -gradient(x.detach(), inputs)
        part.correct_at(float(inputs["q"][t]), optimizer, product)  # type: ignore[arg-type]
        record(optimizer, found)
    return {name: torch.stack(values) for name, values in found.items()}


def record(optimizer: GradientAverage, found: dict[str, list[Tensor]]) -> None:
    """Make the step."""
    (x,) = optimizer.parameters
    found["eta"].append(torch.tensor(optimizer.eta, dtype=torch.float64))
    found["gamma"].append(torch.tensor(optimizer.step_size, dtype=torch.float64))
    optimizer.step()
    found["d"].append(optimizer.state[x]["average"].clone())
    found["theta"].append(x.detach().clone())


OPERATIONS = {"trajectory_gradient_and_hvp": trajectories, "n_pg_igt": n_pg_igt, "harpg": harpg}
