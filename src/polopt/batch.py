"""The data of the contract: what a policy did (`Batch`) and how the current policy sees it (`Evaluation`).

A trajectory is a row; a decision is a token, an action or a denoising step. Dimension letters, the same in the whole
library: N trajectories, T decisions, K reward functions, P prompts or start states, G trajectories of one group,
V vocabulary, H features of the last layer. Log-probabilities, entropies and divergences are in nats.

A field `old_X` of a `Batch` is the field `X` of an `Evaluation` under the behaviour policy, `ref_X` the same under the
reference policy: a part that names one of them in its `requires` finds it there.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from tensordict import TensorClass, TensorDict
from torch import Tensor

ABSENT: Any = None
"""Default of the fields that only some runs have, typed as what they are there: a part reads what it `requires`."""


class Batch(TensorClass):
    """N trajectories of at most T decisions, with what was measured about them. Indexing selects trajectories.

    What lies under `mask == False` is arbitrary and never matters.
    """

    mask: Bool[Tensor, "N T"]
    """True where the decision was the policy's own; prompts, observations, tool output and padding are False."""
    old_logp: Float[Tensor, "N T"]
    """Log-probability of each decision under the behaviour policy that made it."""
    rewards: Float[Tensor, "N K"]
    """Values of the K reward functions for the whole trajectory; NaN where one does not apply to the row."""
    group: Int[Tensor, " N"]
    """Which prompt or start state of this batch the trajectory began at; groups may have any size from 1."""
    prompt_id: Int[Tensor, " N"]
    """The same across iterations: the key of per-prompt statistics."""

    step_rewards: Float[Tensor, "N T"] = ABSENT
    """Rewards per decision, for dense rewards and penalties (a KL penalty in the reward)."""
    old_entropy: Float[Tensor, "N T"] = ABSENT
    """Entropy of the behaviour policy at each decision."""
    old_value: Float[Tensor, "N T"] = ABSENT
    """The critic's prediction of the return from each decision on, when the trajectory was made."""
    old_median: Float[Tensor, "N T"] = ABSENT
    """The critic's smoothed median of the return from each decision on, when the trajectory was made."""
    last_value: Float[Tensor, " N"] = ABSENT
    """The critic's value of the state after the last decision: the bootstrap of a truncated trajectory."""
    ref_logp: Float[Tensor, "N T"] = ABSENT
    """Log-probability under the reference policy that anchors the KL."""
    sampler_logp: Float[Tensor, "N T"] = ABSENT
    """Log-probability that the sampler itself recorded, where its numerics differ from the trainer's."""
    terminated: Bool[Tensor, " N"] = ABSENT
    """The trajectory ended by itself (end of sequence, absorbing state): nothing is bootstrapped."""
    truncated: Bool[Tensor, " N"] = ABSENT
    """The trajectory was cut (length limit, time limit)."""
    turn: Int[Tensor, "N T"] = ABSENT
    """Which turn of a dialogue or episode the decision belongs to, from 0."""
    task: Int[Tensor, " N"] = ABSENT
    """Which task or domain the prompt comes from."""
    answer: Int[Tensor, " N"] = ABSENT
    """Canonical id of the final answer: equal integers inside a group are equal answers; -1 is no answer."""
    policy_version: Int[Tensor, " N"] = ABSENT
    """Iteration whose policy made the trajectory."""
    state_action: Float[Tensor, "N T F"] = ABSENT
    """Observation and action of each decision as numbers: what an occupancy measure is of."""
    scores: Float[Tensor, "N 1 n"] = ABSENT
    """Gradient of the sum of the trajectory's log-probabilities with respect to the n trained parameters."""
    decision_scores: Float[Tensor, "N T n"] = ABSENT
    """The same of each decision's log-probability."""

    advantages: Float[Tensor, "N T"] = ABSENT
    """Filled by the advantage slot. Constant for the gradient."""
    weights: Float[Tensor, "N T"] = ABSENT
    """Filled by the selection slot, >= 0; a row of zeros is not evaluated."""
    loss_weight: Float[Tensor, "N T"] = ABSENT
    """Share of each decision in the loss of its minibatch: `weights` over the denominators of the aggregation."""
    signals: TensorDict = ABSENT
    """Further quantities of the whole iteration, [N, ...], by the name under which a part `provides` them, and what was
    evaluated of the behaviour or reference policy beyond the fields above (`old_features`)."""
    payload: TensorDict = ABSENT
    """The domain's own (tokens; observations and actions; latents): opaque to methods."""

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Decisions of each trajectory."""
        return self.mask.sum(-1)

    def outcome(self) -> Float[Tensor, " N"]:
        """Total reward of each trajectory, float64: rewards that are finite (others count 0) plus rewards per decision."""
        total = self.rewards.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum(-1)
        if self.step_rewards is not None:
            total = total + torch.where(self.mask, self.step_rewards, 0.0).sum(-1, dtype=torch.float64)
        return total

    def signal(self, name: str) -> Tensor:
        """A signal that some part of the method provides.

        Raises:
            KeyError: no part provides it.
        """
        if self.signals is None or name not in self.signals.keys():
            raise KeyError(f"signal {name!r}: no part of the method provides it")
        return self.signals[name]

    def set_signal(self, name: str, value: Shaped[Tensor, "N ..."]) -> None:
        """Attach a signal to the trajectories."""
        if self.signals is None:
            self.signals = TensorDict({}, batch_size=self.batch_size)
        self.signals[name] = value

    def set_evaluated(self, policy: Literal["old", "ref"], evaluation: "Evaluation") -> None:
        """Record what was evaluated of the behaviour ("old") or reference ("ref") policy."""
        for name, tensor in evaluation.tensors().items():
            field = f"{policy}_{name}"
            if field in self.__dataclass_fields__:
                setattr(self, field, tensor)
            else:
                self.set_signal(field, tensor)

    def take(self, rows: Int[Tensor, " n"]) -> Self:
        """Some rows; the batch itself where these are all of them in order."""
        whole = len(rows) == len(self) and torch.equal(rows, torch.arange(len(rows), device=rows.device))
        return self if whole else self[rows]

    def decisions(self, required: frozenset[str]) -> "Batch":
        """The decisions that count, each as a row of its own, [D, 1].

        What a row has as a whole goes with each of them, but that it ended: only its last decision did that. Of the optional
        fields those that are `required` are kept, of the payload what belongs to decisions.
        """
        row, column = self.mask.nonzero(as_tuple=True)
        steps = self.mask.shape[1]
        last = torch.ones_like(row, dtype=torch.bool)
        last[:-1] = row[1:] != row[:-1]
        picked: dict[str, Tensor] = {}
        for path, tensor in self.to_tensors().items():
            if path in OPTIONAL and path not in required:
                continue
            if path != "rewards" and tensor.dim() > 1 and tensor.shape[1] == steps:
                picked[path] = tensor[row, column][:, None]
            elif path in ("terminated", "truncated"):
                picked[path] = tensor[row] & last
            elif not path.startswith("payload."):
                picked[path] = tensor[row]
        return Batch.from_tensors(picked)

    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors by path, for a checkpoint."""
        return {_path(key): tensor for key, tensor in self.items(include_nested=True, leaves_only=True)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """What `to_tensors` was taken of."""
        rows = [len(tensors["mask"])]
        nested = {name: {} for name in ("signals", "payload")}
        for path, tensor in tensors.items():
            if "." in path:
                nested[path.split(".", 1)[0]][path.split(".", 1)[1]] = tensor
        fields = {path: tensor for path, tensor in tensors.items() if "." not in path}
        nests = {name: TensorDict(found, batch_size=rows) for name, found in nested.items() if found}
        return cls(**fields, **nests, batch_size=rows)

    def has(self, name: str) -> bool:
        """Whether a field or signal of that name is there."""
        return getattr(self, name, None) is not None or (
            self.signals is not None and name in self.signals.keys()
        )


@dataclass(frozen=True)
class Evaluation:
    """The current policy's view of a batch's decisions, with gradient. Fields nobody required are None."""

    logp: Float[Tensor, "N T"]
    """Log-probability of the decision taken."""
    entropy: Float[Tensor, "N T"] = ABSENT
    """Exact entropy of the distribution the decision was drawn from."""
    value: Float[Tensor, "N T"] = ABSENT
    """The critic's prediction of the return from the decision on."""
    median: Float[Tensor, "N T"] = ABSENT
    """The critic's smoothed median of the return from the decision on."""
    kl: Float[Tensor, "N T"] = ABSENT
    """Exact divergence KL(policy || behaviour policy) between the distributions that the decision is drawn from."""
    score_sqnorm: Float[Tensor, "N T"] = ABSENT
    """Squared norm of the gradient of `logp` with respect to the logits: 1 - 2 p(a) + sum_v p(v)^2. No gradient."""
    tempered_logp: Float[Tensor, "N T"] = ABSENT
    """Log-probability of the decision at the temperature of the option `temperature`. No gradient."""
    features: Float[Tensor, "N T H"] = ABSENT
    """Input of the last linear layer. No gradient."""
    kept_logits: Float[Tensor, "N T k"] = ABSENT
    """The largest logits, as many as the option `kept`. No gradient."""
    kept_rows: Int[Tensor, "N T k"] = ABSENT
    """Which rows of the last layer the kept logits belong to."""
    action_row: Int[Tensor, "N T"] = ABSENT
    """Which row of the last layer belongs to the decision taken."""
    fresh_logp: Float[Tensor, "N T"] = ABSENT
    """Log-probability of a decision drawn anew from the current policy; its gradient flows through the decision too."""
    fresh_old_logp: Float[Tensor, "N T"] = ABSENT
    """The same decision's under the policy of the last mirror step; gradient through the decision alone."""
    fresh_q: Float[Tensor, "N T 2"] = ABSENT
    """Both critics' values of that decision; gradient through the decision alone: their parameters are constant."""
    q: Float[Tensor, "N T 2"] = ABSENT
    """Both critics' values of the decision taken; gradient to their parameters."""
    next_value: Float[Tensor, "N T"] = ABSENT
    """The target network's value of the state that the decision led to. No gradient."""
    squared_outputs: Float[Tensor, "N T"] = ABSENT
    """Mean square of the Gaussian's means plus that of its log standard deviations."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def map(self, function: Any) -> Self:
        """The evaluation with `function` applied to each tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def detach(self) -> Self:
        """The same values without gradient."""
        return self.map(lambda tensor: tensor.detach())

    def where(self, mask: Bool[Tensor, "N T"]) -> Self:
        """The evaluation with zeros outside `mask`, which also stops whatever gradient lies there."""
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return self
        return self.map(lambda tensor: zero_elsewhere(tensor, mask))


EVALUATED = frozenset(f.name for f in fields(Evaluation))
"""Names of what an actor may be asked to evaluate."""
OFF_POLICY = frozenset({"fresh_logp", "fresh_old_logp", "fresh_q", "q", "next_value", "squared_outputs"})
"""Those that off-policy losses read, on decisions from a replay buffer."""


OPTIONAL = frozenset(Batch.__dataclass_fields__) - {
    "mask", "old_logp", "rewards", "group", "prompt_id",
    "advantages", "weights", "loss_weight", "signals", "payload",
}  # fmt: skip
"""Fields of a batch that only some runs have."""


def zero_elsewhere(values: Shaped[Tensor, "N T ..."], mask: Bool[Tensor, "N T"]) -> Shaped[Tensor, "N T ..."]:
    """`values` of the decisions in `mask`, 0 elsewhere; no gradient flows to what is masked, whatever it is."""
    shaped = mask.view(mask.shape + (1,) * (values.dim() - mask.dim()))
    return torch.where(shaped, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _path(key: str | tuple[str, ...]) -> str:
    """The name of a tensor inside a batch."""
    return ".".join(key) if isinstance(key, tuple) else key


def concatenate(batches: list[Batch]) -> Batch:
    """One batch of the rows of several; groups are renumbered so that none merge.

    Tensors of different widths (decisions, prompt lengths) are padded with zeros to the widest.

    Raises:
        ValueError: `batches` is empty, or a field is in some of them only.
    """
    if not batches:
        raise ValueError("concatenate: needs at least one batch")
    leaves = [dict(b.items(include_nested=True, leaves_only=True)) for b in batches]
    if any(found.keys() != leaves[0].keys() for found in leaves):
        raise ValueError("concatenate: a field is in some of the batches only")
    widths = {
        name: max(found[name].shape[1] for found in leaves) for name in leaves[0] if leaves[0][name].dim() > 1
    }
    joined, offset = [], 0
    for batch in batches:
        batch = batch.named_apply(lambda name, t: _widen(t, widths.get(name, 0)), nested_keys=True)
        batch.group = batch.group + offset
        offset = int(batch.group.max()) + 1 if len(batch) else offset
        joined.append(batch)
    return cast(Batch, torch.cat(cast(Any, joined), 0))


def _widen(tensor: Tensor, width: int) -> Tensor:
    """`tensor` [N, w, ...] with zeros appended up to a width."""
    if tensor.dim() < 2 or tensor.shape[1] >= width:
        return tensor
    return torch.cat(
        [tensor, tensor.new_zeros(tensor.shape[0], width - tensor.shape[1], *tensor.shape[2:])], 1
    )
