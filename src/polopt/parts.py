"""The eight slots of a method and what fills them: a `Part`, and the base class of each slot.

    sampler -> budget -> (rollout) -> shaping -> advantage -> selection -> [surrogate + regularizers] -> optimizer

The base class of a slot is its classic filling where there is one: `Sampler()` goes through shuffled epochs, `Budget()`
gives every prompt as many rollouts, `Selection()` keeps everything, `Optimizer()` is AdamW. A part sees only `Batch` and
`Evaluation`: nothing of tokens, ranks, micro-batches, padding or devices.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from polopt.adamw import AdamW
from polopt.batch import Batch, Evaluation
from polopt.functional.aggregation import Aggregation, Denominator, aggregation_weights
from polopt.settings import Settings

Draw = Callable[[str], torch.Generator]
"""Gives the generator of a named stream of this iteration: the only source of randomness a part may use."""
HessianProduct = Callable[[Sequence[Tensor]], list[Tensor]]
"""Estimates, from a further rollout at the present parameters, the loss's Hessian times a direction; per parameter."""


class Part(nn.Module):
    """One filling of one slot: validated `Config`, pure functions for the mathematics, buffers for whatever it remembers.

    A subclass declares what it needs and gives; the run refuses a combination that cannot work before it starts.
    """

    slot: ClassVar[str]
    name: ClassVar[str] = "default"
    requires: frozenset[str] = frozenset()
    """Fields it reads: of `Evaluation` (`entropy`), of `Batch` (`ref_logp`), or signals (`target_advantages`)."""
    provides: frozenset[str] = frozenset()
    """Signals it makes for the parts of other slots."""
    domains: ClassVar[frozenset[str] | None] = None
    """Domains it makes sense on; None: all."""
    grows: ClassVar[tuple[str, ...]] = ()
    """Buffers whose size changes while the run goes on."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1]; set before each iteration."""
    learning_rate: float = 0.0
    """The optimizer's present rate; set before each iteration."""
    reconstructed: ClassVar[str] = ""
    """What of it the published sources do not fix; shown by `polopt methods`."""

    class Config(Settings):
        """Options of the part."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__()
        self.config: Any = self.Config.create(f"{self.slot} {self.name}", **options)

    def evaluation_options(self) -> dict[str, Any]:
        """Options for the actor's evaluation, read before each iteration: `temperature`, `kept`."""
        return {}

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        """The signals it `provides`, [N] or [N, T], from the whole iteration's batch with advantages and weights."""
        return {}

    def after_step(self, evaluation: Evaluation, batch: Batch) -> None:
        """Called after each optimizer step with the minibatch and its evaluation, detached, as it was before the step."""

    def observe(self, batch: Batch) -> None:
        """Called once an iteration, after its updates, with the whole batch: the place where statistics are updated."""

    def extra_repr(self) -> str:
        return f"{self.name}, {self.config}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.grows:
            setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Sampler(Part):
    """Which prompts or start states come next. The classic: shuffled epochs over the pool."""

    slot = "sampler"
    max_rounds: int = 1
    """Rollout rounds an iteration may take until enough trajectories are accepted."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))

    def forward(
        self, pool_size: int, count: int, of_epoch: Callable[[int], torch.Generator], draw: Draw
    ) -> Int[Tensor, " P"]:
        """The next `count` prompt ids of a pool of `pool_size`, and remembers having given them."""
        start = int(self.drawn)
        self.drawn += count
        epochs = range(start // pool_size, (start + count - 1) // pool_size + 1)
        order = torch.cat([torch.randperm(pool_size, generator=of_epoch(epoch)) for epoch in epochs])
        first = start % pool_size
        return order[first : first + count]

    def to_score(
        self, pool_size: int, of_epoch: Callable[[int], torch.Generator]
    ) -> tuple[Int[Tensor, " P"], int] | None:
        """Prompts whose rollouts it wants to see before it draws, and how many of each; None: none now.

        These rollouts are not trained on.
        """
        return None

    def take_scores(self, batch: Batch) -> None:
        """The rollouts that `to_score` asked for."""

    def accepts(self, batch: Batch) -> Bool[Tensor, " N"]:
        """Which trajectories are kept for training; prompts are drawn again for what is missing, up to `max_rounds`."""
        return torch.ones(len(batch), dtype=torch.bool)


class Budget(Part):
    """How many rollouts each prompt gets. The classic: all the same."""

    slot = "budget"

    def forward(self, prompt_ids: Int[Tensor, " P"], total: int, draw: Draw) -> Int[Tensor, " P"]:
        """Rollouts of each prompt; they sum to `total`. A remainder goes to the first prompts."""
        count = len(prompt_ids)
        return torch.full((count,), total // count) + (torch.arange(count) < total % count)


class Shaping(Part):
    """What the reward is, once measured."""

    slot = "shaping"

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        """The batch with other `rewards` or `step_rewards`, or with further fields that say how they belong together."""
        raise NotImplementedError


class Advantage(Part):
    """How much better than expected. Sees the whole batch of the iteration; constant for the gradient."""

    slot = "advantage"

    def forward(self, batch: Batch) -> Float[Tensor, "N #T"]:
        """Advantages [N, T], or [N, 1] where all decisions of a trajectory share one; reward units unless it says so."""
        raise NotImplementedError


class AdvantageTransform(Part):
    """An advantage part that changes what an estimator before it found (A -> w A)."""

    slot = "advantage"

    def forward(self, batch: Batch, advantages: Float[Tensor, "N T"]) -> Float[Tensor, "N #T"]:
        """The changed advantages."""
        raise NotImplementedError


class Selection(Part):
    """Which trajectories and decisions teach. The classic: all, with weight 1."""

    slot = "selection"
    before_advantage: bool = False
    """True: selects on rewards, and advantages see only what was kept. False: selects on advantages, which stay as
    they are (they are never normalised again)."""

    def forward(self, batch: Batch, draw: Draw) -> Float[Tensor, "N #T"]:
        """Weights >= 0; a trajectory of zeros is not evaluated at all."""
        return torch.ones(len(batch), 1)


class Surrogate(Part):
    """What is ascended, and how the importance ratio is held. Subclasses define `decision_loss`.

    A loss that is not a sum over trajectories overrides `forward` and declares its `coupling`.
    """

    slot = "surrogate"
    coupling: ClassVar[Literal["decision", "sequence", "group", "batch"]] = "decision"
    """What the loss of one decision depends on. From "group" on, minibatches keep groups whole."""
    any_origin: ClassVar[bool] = False
    """Right for trajectories of any origin: it reads nothing of the policy that made them."""
    zero_advantage_is_silent: ClassVar[bool] = True
    """A trajectory whose advantages are all 0 adds neither loss nor gradient."""

    class Config(Settings):
        """What the loss averages."""

        aggregation: Aggregation = "token_mean"
        """What is averaged over what; see `polopt.functional.aggregation`."""
        denominator: Denominator = "all"
        """Whether decisions of weight 0 count in the averages."""
        constant: float | None = Field(None, gt=0)
        """Length in decisions that `constant` divides by; the longest of the batch if not given."""

    def loss_weights(self, batch: Batch) -> Float[Tensor, "N T"]:
        """Share of each decision in the loss of this minibatch."""
        c = self.config
        weights = cast(Tensor, batch.weights)
        return aggregation_weights(batch.mask, weights, batch.group, c.aggregation, c.denominator, c.constant)

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        """Loss of each decision, to be minimised; may be anything finite outside the mask."""
        raise NotImplementedError

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        """The loss of a minibatch: sum of `loss_weight * decision_loss`."""
        return (batch.loss_weight * self.decision_loss(evaluation, batch)).sum()

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"] | None:
        """Which decisions the ratio control cut off, for the diagnostics; None if it never does."""
        return None


class Regularizer(Part):
    """What else is paid for. Subclasses define `decision_penalty`, or override `forward` and set `separable` False."""

    slot = "regularizers"
    separable: ClassVar[bool] = True
    """The penalty is a sum over trajectories."""

    class Config(Settings):
        """Weight of the penalty."""

        coef: float = Field(0.01, ge=0)
        """Coefficient of the penalty in the loss."""

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        """Penalty of each decision, averaged like the surrogate's loss."""
        raise NotImplementedError

    def forward(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, ""]:
        """The penalty of a minibatch, to be added to the loss."""
        return (self.config.coef * batch.loss_weight * self.decision_penalty(evaluation, batch)).sum()


class Optimizer(Part):
    """How far, in which geometry. The classic: AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    slot = "optimizer"

    class Config(Settings):
        """AdamW's constants."""

        beta1: float = Field(0.9, ge=0, lt=1)
        """Decay of the gradient's average."""
        beta2: float = Field(0.999, ge=0, lt=1)
        """Decay of the squared gradient's average."""
        eps: float = Field(1e-8, gt=0)
        """Added to the root of the squared gradient's average."""
        weight_decay: float = Field(0.0, ge=0)
        """Decoupled weight decay per unit of learning rate."""

    per_group_gradients: ClassVar[bool] = False
    """It needs the gradient of each group apart, and says by `rate_share` what share of the learning rate to take."""

    def rate_share(self, square_sum: Float[Tensor, ""], mean_square: Float[Tensor, ""], groups: int) -> float:
        """Share of the learning rate, from sum |g_p|^2 and |mean g|^2 of the groups' gradients before clipping."""
        return 1.0

    averages_rollouts: ClassVar[bool] = False
    """It averages the gradients of rollouts: one update of each, with its gradient as it is (not clipped, and 0 where no
    trajectory teaches)."""
    second_rollout: ClassVar[bool] = False
    """It asks for Hessian-vector products."""

    def at_rollout(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Inside it the parameters are those at which the next rollout is made, and its gradient taken.

        Scores, checkpoints and the step itself are outside.
        """
        return nullcontext()

    def correct_gradient(
        self, optimizer: torch.optim.Optimizer, hessian_product: HessianProduct, draw: Draw
    ) -> None:
        """Called before each step, with the loss's gradient in the parameters' `.grad`, which it may change."""

    def build(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        c = self.config
        return AdamW(parameters, lr, (c.beta1, c.beta2), c.eps, c.weight_decay, fused=True)


SLOTS: dict[str, type[Part]] = {
    part.slot: part
    for part in (Sampler, Budget, Shaping, Advantage, Selection, Surrogate, Regularizer, Optimizer)
}
"""The slots in the order of the data, each with its base class."""
MANY = frozenset({"shaping", "advantage", "regularizers"})
"""Slots that take several parts, applied in order: an advantage estimator and then its transforms."""
