r"""COPO - Consistency-Aware Policy Optimization (arXiv 2508.04138, 2025).

A prompt whose answers all get the same reward teaches nothing inside its group. A second, batch-level advantage compares
prompts with each other; the losses of the two are blended by the entropy of a prompt's answers: prompts whose answers
disagree learn locally, those whose answers agree learn globally.

.. math::
    H_g = -\sum_c \hat p_c \log_2 \hat p_c, \quad
    R^{glob}_g = \bar r_g \text{ or } \bar r_g(1 - \lambda_n H_g), \ \lambda_n = \frac{1 - 1/n}{\log_2 n} \tag{1, 2}

.. math::
    A^{loc}_i = \frac{r_i - \bar r_g}{\mathrm{std}_g + \epsilon}, \quad
    A^{glob}_i = \frac{R^{glob}_{g(i)} - \mathrm{mean}_g R^{glob}}{\mathrm{std}_g R^{glob} + \epsilon} \tag{3, 4}

.. math::
    \omega_g = \sigma(\gamma(H_g - \rho)), \quad
    \ell_{it} = \omega_i\,\ell_{it}(A^{loc}_i) + (1 - \omega_i)\,\ell_{it}(A^{glob}_i) \tag{5, 7}

Modes of the blend: `soft` (5); `soft_forced` gives zero-variance prompts the global loss alone; `hard_forced` is a
switch on A^loc != 0; `soft_correct_only` gives wrong answers the global loss alone; `global`, `local` (= GRPO). A single
prompt, and a group of one, have advantages 0. Do not combine with a filter of zero-variance prompts.

Slots: advantage `copo` (signals `global_advantages`, `local_weight`), surrogate `blended` (PPO clip of two advantages).
Under any other surrogate the method has the blended advantage, whose on-policy gradient is the same. Entropy is over
extracted answers (`answer`), in bits.

Use it when many prompts earn the same in all their rollouts, above all wrong in all of them, and answers can be compared.
Not beside dynamic sampling or an accuracy filter: these remove exactly the prompts that it is for.

Pitfalls: the global advantage pushes all answers of a prompt alike, wrong answers of easy prompts too;
`soft_correct_only` makes that worse. Entropy is over final answers in bits, so rho = 1 is one bit; answers have to be
normalised, and those that cannot be read share one id.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.aggregation import Aggregation
from polopt.functional.groups import Groups
from polopt.functional.ratio import clipped_surrogate, dual_clipped, log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import group_standardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Advantage
from polopt.registry import register, register_recipe
from polopt.settings import Settings

Mode = Literal["soft", "soft_forced", "hard_forced", "soft_correct_only", "global", "local"]
NONZERO = 1e-8
"""Local advantages up to this size count as 0."""


def answer_entropy(answer: Int[Tensor, " N"], groups: Groups) -> Float[Tensor, " P"]:
    """Equation (1): entropy of the answers of each group, in bits."""
    pairs = torch.stack([groups.index, answer], -1)
    distinct, counts = torch.unique(pairs, dim=0, return_counts=True)
    share = counts.double() / groups.size[distinct[:, 0]]
    return torch.zeros(len(groups.size), dtype=torch.float64).index_add_(
        0, distinct[:, 0], -share * share.log2()
    )


def global_reward(
    outcome: Float[Tensor, " N"], entropy: Float[Tensor, " P"], groups: Groups, consistency: bool
) -> Float[Tensor, " P"]:
    """Equation (2): accuracy of each prompt, discounted by the disagreement of its answers if `consistency`."""
    mean = groups.mean(outcome)
    if not consistency:
        return mean
    n = groups.size.double()
    rate = torch.where(groups.size > 1, (1 - 1 / n) / n.clamp(min=2).log2(), 0.0)
    return mean * (1 - rate * entropy)


def prompt_standardized(values: Float[Tensor, " P"], eps: float) -> Float[Tensor, " P"]:
    """Equation (4) over prompts, each counted once; 0 for a single prompt."""
    everyone = Groups.of(torch.zeros(len(values), dtype=torch.int64))
    return everyone.centre(values) / (everyone.broadcast(everyone.std(values)) + eps)


def local_weight(
    entropy: Float[Tensor, " N"],
    local: Float[Tensor, " N"],
    outcome: Float[Tensor, " N"],
    mode: Mode,
    gamma: float,
    rho: float,
) -> Float[Tensor, " N"]:
    """Equation (5) and its variants: the weight of the local loss of each trajectory."""
    soft = torch.sigmoid(gamma * (entropy - rho))
    varied: Bool[Tensor, " N"] = local.abs() > NONZERO
    match mode:
        case "soft":
            return soft
        case "soft_forced":
            return soft * varied
        case "hard_forced":
            return varied.to(soft)
        case "soft_correct_only":
            return soft * (outcome != 0)
        case "global":
            return torch.zeros_like(soft)
        case "local":
            return torch.ones_like(soft)


@register("copo")
class LocalGlobal(Advantage):
    """Local and global advantage and the weight that blends them, equations (1) to (5)."""

    requires = frozenset({"answer"})
    provides = frozenset({"local_advantages", "global_advantages", "local_weight"})

    class Config(Settings):
        """Options of the two advantages and their blend."""

        mode: Mode = "soft"
        """How the weight of the local loss is found."""
        gamma: float = Field(5.0, ge=0)
        """Steepness of the blend, per bit (20 for the paper's 3B runs)."""
        rho: float = 1.0
        """Answer entropy in bits at which both losses weigh the same."""
        consistency: bool = False
        """Discount the global reward by the disagreement of the answers."""
        eps: float = Field(1e-6, gt=0)
        """Added to the standard deviations."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        found = self.signals(batch)
        weight = found["local_weight"]
        return (weight * found["local_advantages"] + (1 - weight) * found["global_advantages"])[:, None]

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        c, groups, outcome = self.config, Groups.of(batch.group), batch.outcome()
        entropy = answer_entropy(batch.answer, groups)
        local = group_standardized(outcome, batch.group, c.eps)
        everywhere = prompt_standardized(global_reward(outcome, entropy, groups, c.consistency), c.eps)
        weight = local_weight(groups.broadcast(entropy), local, outcome, c.mode, c.gamma, c.rho)
        return {
            "local_advantages": local, "global_advantages": groups.broadcast(everywhere), "local_weight": weight,
        }  # fmt: skip


@register("blended")
class BlendedClip(PPOClip):
    """Two clipped losses on one ratio, blended, equation (7)."""

    requires = frozenset({"local_advantages", "global_advantages", "local_weight"})
    zero_advantage_is_silent = False

    class Config(PPOClip.Config):
        """Options of the blended loss."""

        aggregation: Aggregation = "sequence_mean"
        """What is averaged over what."""
        dual_clip: float | None = Field(3.0, gt=1)
        """Bound on ratio * |A| where A < 0."""

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        c = self.config
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()

        def loss(name: str) -> Tensor:
            advantages = batch.signal(name)[:, None].expand_as(ratio)
            return dual_clipped(
                clipped_surrogate(ratio, advantages, c.clip_low, c.clip_high), advantages, c.dual_clip
            )

        weight = batch.signal("local_weight")[:, None]
        return weight * loss("local_advantages") + (1 - weight) * loss("global_advantages")


@register_recipe("copo")
def copo() -> Method:
    """COPO in the `soft` mode."""
    return Method(advantage=LocalGlobal(), surrogate=BlendedClip(), defaults={"minibatches": 4})
