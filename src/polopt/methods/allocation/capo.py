r"""CAPO - Curvature-Aware Policy Optimization (arXiv 2510.00819, ICLR 2026).

From "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning".

Predicts for every token how far its own optimizer step would move the objective (second order) and the policy (Fisher),
in a model that holds only the last linear layer, and masks the few tokens whose predicted shift leaves a trust region.

With h the features, z = W h the kept logits, pi their softmax, e_a the one-hot of the action (zero if it is not kept), A the
advantage and lr the current rate:

.. math::
    v = e_a - \pi, \quad g = A\,v \otimes h, \quad \Delta = \mathrm{opt}(g), \quad u = \Delta h \tag{1, 2, 3}

.. math::
    m_H = lr \langle g, \Delta\rangle + \tfrac12 lr^2 A\big[(v^\top u)^2 - u^\top F u\big], \quad
    F = \mathrm{diag}(\pi) - \pi\pi^\top \tag{4}

.. math::
    m_F = \tfrac12 lr^2 (v^\top u)^2, \qquad
    \text{accept iff } m_F < \tau_F \text{ and } -\tau_H < m_H < \tau_H \tag{5, 6}

The step model is SGD (Delta = g) or Adam with moments per row of the layer (9), apart from the real optimizer's; while
no row has moments, Delta = g. The asymmetric rule accepts 0 <= m_H < tau_H; a threshold of 0 switches its test off. The
loss is averaged over the accepted tokens of each sequence (7).

RECONSTRUCTED: other policies than a softmax over kept logits. Weight decay, clipping and warm-up are not modelled; the
current learning rate is. Suggestion: calibrate the thresholds at the 99th percentile of the first healthy iterations.

Slots: selection, after the advantage; needs `old_features`, `old_kept_logits`, `old_kept_rows`, `old_action_row`.

Use it when a learning rate or a batch is so aggressive that training collapses, and data are dear. Not at a conservative
rate, where it rejects nothing and costs the features of every token.

Pitfalls: the thresholds are absolute and fit rates near 1.5e-5: m_F grows with lr squared. Where nothing that has an
advantage is accepted, nothing is ever learned, and `selected` still shows the tokens with A = 0. So set tau_policy anew
first, with tau_objective=0: m_H grows with A, so the objective test turns down the tokens of a rare success before those
of the many failures, and the policy is pushed down only. Thresholds of the two step models differ by orders of magnitude:
never take over the other's. The first iteration has no moments and shifts of another size. `symmetric=false` rejects
every predicted loss, under Adam a large share. A trajectory with one accepted token gives that token its whole weight.

Not the credit assignment method nor the prompt optimizer that are called CAPO too.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Draw, Selection
from polopt.registry import register, register_recipe
from polopt.settings import Settings


class Moments(NamedTuple):
    """Adam's moments of the rows that have any; row r of the layer is at `place[r]`, or has none if that is -1."""

    place: Int[Tensor, " rows"]
    first: Float[Tensor, "known H"]
    second: Float[Tensor, "known H"]
    steps: int


class AdamConstants(NamedTuple):
    """Adam's decay rates and epsilon."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


ADAM = AdamConstants()


class Shifts(NamedTuple):
    """Predicted shifts of each token's own step."""

    objective: Float[Tensor, " n"]
    policy: Float[Tensor, " n"]


def score(
    logits: Float[Tensor, "n V"], rows: Int[Tensor, "n V"], action: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n V"]]:
    """Equation (1): v = e_a - pi over the kept rows, and pi."""
    pi = logits.softmax(-1)
    return (rows == action[:, None]).to(pi) - pi, pi


def predicted_shifts(
    features: Float[Tensor, "n H"],
    logits: Float[Tensor, "n V"],
    rows: Int[Tensor, "n V"],
    action: Int[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    lr: float,
    moments: Moments | None = None,
    adam: AdamConstants = ADAM,
) -> Shifts:
    """Equations (1) to (5); SGD's step if `moments` is None or no row has any.

    Args:
        features: input of the last layer at each token.
        logits: kept logits.
        rows: which rows of the layer they belong to.
        action: row of the action taken.
        advantages: of each token.
        lr: current learning rate.
        moments: Adam's state.
        adam: Adam's constants.
    """
    v, pi = score(logits, rows, action)
    scale = advantages[:, None] * v
    if moments is None or not len(moments.first):
        square = features.square().sum(-1, keepdim=True)
        u, inner = scale * square, scale.square().sum(-1) * square[:, 0]
    else:
        g = scale[..., None] * features[:, None]
        delta = adam_direction(g, rows, moments, adam)
        u, inner = (delta * features[:, None]).sum(-1), (g * delta).sum((-1, -2))
    along = (v * u).sum(-1)
    fisher = (pi * u.square()).sum(-1) - (pi * u).sum(-1).square()
    objective = lr * inner + lr**2 / 2 * advantages * (along.square() - fisher)
    return Shifts(objective, lr**2 / 2 * along.square())


def adam_direction(
    g: Float[Tensor, "n V H"], rows: Int[Tensor, "n V"], moments: Moments, adam: AdamConstants
) -> Float[Tensor, "n V H"]:
    """Equation (2): Adam's direction for a gradient of its own, with the moments as they are."""
    place = moments.place[rows]
    known = (place >= 0)[..., None]
    first = torch.where(known, moments.first[place], 0.0)
    second = torch.where(known, moments.second[place], 0.0)
    steps = moments.steps + 1
    m = (adam.beta1 * first + (1 - adam.beta1) * g) / (1 - adam.beta1**steps)
    w = (adam.beta2 * second + (1 - adam.beta2) * g.square()) / (1 - adam.beta2**steps)
    return m / (w.sqrt() + adam.eps)


def accepted(
    shifts: Shifts, tau_objective: float, tau_policy: float, symmetric: bool = True
) -> Bool[Tensor, " n"]:
    """Equation (6)."""
    keep = torch.ones_like(shifts.policy, dtype=torch.bool)
    if tau_policy > 0:
        keep &= shifts.policy < tau_policy
    if tau_objective > 0:
        keep &= shifts.objective < tau_objective
        keep &= (shifts.objective > -tau_objective) if symmetric else (shifts.objective >= 0)
    return keep


def updated_moments(
    features: Float[Tensor, "n H"],
    logits: Float[Tensor, "n V"],
    rows: Int[Tensor, "n V"],
    action: Int[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    moments: Moments,
    adam: AdamConstants = ADAM,
) -> Moments:
    """Equation (9): one Adam step of the rows that occur, on their mean gradient over the (accepted) tokens given."""
    v, _ = score(logits, rows, action)
    occurring, index, counts = torch.unique(rows, return_inverse=True, return_counts=True)
    scale = advantages[:, None] * v
    features = features.to(scale)  # bfloat16 under autocast
    total = features.new_zeros(len(occurring), features.shape[-1])
    for column in range(rows.shape[1]):
        total.index_add_(0, index[:, column], scale[:, column, None] * features)
    mean = total / counts[:, None]
    place = moments.place.clone()
    new = occurring[place[occurring] < 0]
    place[new] = torch.arange(len(moments.first), len(moments.first) + len(new))
    empty = mean.new_zeros(len(new), mean.shape[-1])
    first, second = torch.cat([moments.first, empty]), torch.cat([moments.second, empty])
    at = place[occurring]
    first[at] = adam.beta1 * first[at] + (1 - adam.beta1) * mean
    second[at] = adam.beta2 * second[at] + (1 - adam.beta2) * mean.square()
    return Moments(place, first, second, moments.steps + 1)


@register("capo")
class CurvatureFilter(Selection):
    """Masks tokens whose own step would leave the trust region, equations (1) to (6), (9)."""

    requires = frozenset({"old_features", "old_kept_logits", "old_kept_rows", "old_action_row"})
    grows = ("place", "first", "second")
    place: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    reconstructed = "policies other than a softmax over kept logits"

    class Config(Settings):
        """Options of the filter."""

        tau_policy: float = Field(1e-4, ge=0)
        """Largest predicted policy shift in nats; 0 switches the test off (CAPO 1e-4, Dr. CAPO 1e-3, ReinCAPO 1e-5)."""
        tau_objective: float = Field(0.01, ge=0)
        """Largest predicted objective shift; 0 switches the test off (CAPO 0.01, Dr. CAPO 5e-4, ReinCAPO 0.1)."""
        symmetric: bool = True
        """Also accept predicted losses down to -tau_objective; False accepts gains alone."""
        step_model: Literal["adam", "sgd"] = "adam"
        """Which optimizer's step is predicted."""
        kept: int = Field(50, ge=2)
        """Logits kept per token: the sampler's top-k."""
        chunk: int = Field(256, ge=1)
        """Tokens whose steps are predicted at once; bounds memory, never changes the result."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("place", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("first", torch.zeros(0, 0))
        self.register_buffer("second", torch.zeros(0, 0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def evaluation_options(self) -> dict[str, Any]:
        return {"kept": self.config.kept}

    def forward(self, batch: Batch, draw: Draw) -> Float[Tensor, "N T"]:
        c, moments = self.config, None if self.config.step_model == "sgd" else self._moments()
        f, z, rows, action, advantages = (t.split(c.chunk) for t in self._tokens(batch, batch.mask))
        chunks = zip(f, z, rows, action, advantages, strict=True)
        rule = (c.tau_objective, c.tau_policy, c.symmetric)
        keep = [accepted(predicted_shifts(*chunk, self.learning_rate, moments), *rule) for chunk in chunks]
        weights = torch.zeros_like(batch.old_logp)
        weights[batch.mask] = torch.cat(keep).to(weights) if keep else weights[batch.mask]
        return weights

    def observe(self, batch: Batch) -> None:
        chosen = batch.mask & (batch.weights > 0)
        if self.config.step_model == "sgd" or not bool(chosen.any()):
            return
        features, logits, rows, action, advantages = self._tokens(batch, chosen)
        moments = self._moments(int(rows.max()) + 1, features)
        new = updated_moments(features, logits, rows, action, advantages, moments)
        self.place, self.first, self.second = new.place, new.first, new.second
        self.steps.fill_(new.steps)

    def _tokens(
        self, batch: Batch, mask: Bool[Tensor, "N T"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        names = ("old_features", "old_kept_logits", "old_kept_rows", "old_action_row")
        features, logits, rows, action = (batch.signal(name)[mask] for name in names)
        return features, logits, rows, action, batch.advantages[mask].to(features)

    def _moments(self, rows: int = 0, like: Tensor | None = None) -> Moments:
        place = torch.cat([self.place, torch.full((max(0, rows - len(self.place)),), -1, dtype=torch.int64)])
        if like is None or self.first.numel():
            return Moments(place, self.first, self.second, int(self.steps))
        none = like.new_zeros(0, like.shape[-1])
        return Moments(place, none, none, int(self.steps))


@register_recipe("capo")
def capo() -> Method:
    """CAPO over GRPO with the thresholds of the repository."""
    return Method(
        advantage=GroupStandardized(eps=1e-4),
        selection=CurvatureFilter(),
        surrogate=PPOClip(aggregation="sequence_mean", denominator="selected_decisions"),
    )
