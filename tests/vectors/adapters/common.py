"""What adapters share: a batch from a case's inputs, and the loss and gradient of a surrogate on it."""

from typing import Any

import torch
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.parts import Part, Surrogate

Values = dict[str, Any]
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "token_mean": "token_mean",
}


def batch_of(inputs: Values) -> Batch:
    """A batch of the inputs that are there; advantages [N] are given to every decision."""
    old_logp = inputs.get("old_logp", inputs["logp"])
    rows, mask = len(old_logp), inputs["mask"].bool()
    rewards = inputs.get("rewards", torch.zeros(rows)).double()
    batch = Batch(
        mask=mask,
        old_logp=old_logp,
        rewards=rewards if rewards.dim() == 2 else rewards[:, None],
        group=inputs.get("group", torch.zeros(rows, dtype=torch.int64)).long(),
        prompt_id=torch.arange(rows),
        batch_size=[rows],
    )
    batch.weights = mask.double()
    if "ref_logp" in inputs:
        batch.ref_logp = inputs["ref_logp"]
    if "advantages" in inputs:
        set_advantages(batch, inputs["advantages"])
    return batch


def set_advantages(batch: Batch, advantages: Tensor) -> None:
    """Advantages [N] or [N, T], 0 outside the mask."""
    shaped = advantages[:, None] if advantages.dim() == 1 else advantages
    batch.advantages = torch.where(batch.mask, shaped.double().expand(batch.mask.shape), 0.0)


def attach_signals(part: Part, batch: Batch) -> None:
    """The signals that a part provides."""
    for name, value in part.signals(batch).items():
        batch.set_signal(name, value)


def loss_and_gradient(surrogate: Surrogate, batch: Batch, logp: Tensor) -> Values:
    """The loss of the whole batch and its derivative with respect to `logp`."""
    batch.loss_weight = surrogate.loss_weights(batch)
    leaf = logp.clone().requires_grad_()
    loss = surrogate(Evaluation(leaf).where(batch.mask), batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), "grad_logp": gradient}


def first_rows(group: Tensor) -> Tensor:
    """The first row of each group, in the order in which the groups appear."""
    seen: dict[int, int] = {}
    for row, number in enumerate(group.tolist()):
        seen.setdefault(number, row)
    return torch.tensor(list(seen.values()), dtype=torch.int64)


def masked(values: Tensor, batch: Batch) -> Tensor:
    """Zeros outside the mask."""
    return torch.where(batch.mask, values, torch.zeros((), dtype=values.dtype))
