r"""ADORA - Advantage Dynamics via Online Rollout Adaptation (arXiv 2602.10019, 2026).

After each rollout every prompt is labelled as advantageous for training (TAS) or not, from the lengths and the success
rate of its own rollouts, and the advantages of its group are multiplied by a weight. Wraps any estimator: A -> w A.

.. math::
    S = \{i: r_i > \theta\}, \quad F = \{i: r_i \le \theta,\ \ell_i < \ell_{max}\} \tag{1}

.. math::
    LA_g = [\max_S \ell_i > \mathrm{mean}_F\,\ell_i], \quad DA_g = [|S| / G \le \tau] \tag{2, 3}

.. math::
    w_g = \begin{cases}1 \text{ if TAS else } w & \text{attenuate} \\ w \text{ if TAS else } 1 & \text{amplify}\end{cases},
    \quad A_i = w_{g(i)} A^{base}_i \tag{5, 6}

TAS is LA, DA, both or either (`criterion`). Presets: `vlm` (attenuate by 0.1 on length: paper and released VLM code),
`llm_code` (the released LLM code), `llm_paper` (amplify by 2 on both criteria; RECONSTRUCTED: that it is both). Most of
the raw gain is step size: compare with weights renormalised to mean 1 (`normalize`).

Slots: advantage transform. `--advantage grpo --advantage adora:mode=amplify`.

Use it when prompts differ much in difficulty and a longer scratchpad helps on the hard ones. Not with one-token answers,
where no length can differ, nor as a free gain: against GRPO at the mean weight's learning rate most of it goes.

Pitfalls: labels from 5 to 8 rollouts flicker, and the effective learning rate moves with the share of TAS prompts. The
length criterion rewards verbosity: watch truncation, and let l_max be the real generation limit. The threshold is in
reward units. With nearly constant graded rewards a standardised base advantage is noise, which the weight multiplies.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.kl import KLPenalty
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import AdvantageTransform
from polopt.registry import register, register_recipe
from polopt.settings import Settings

Criterion = Literal["length", "difficulty", "and", "or"]

PRESETS: dict[str, dict[str, object]] = {
    "vlm": {
        "mode": "attenuate", "criterion": "length", "weight": 0.1, "threshold": 0.5, "max_length": 4094,
        "no_success": True, "no_failure": False,
    },
    "llm_code": {
        "mode": "attenuate", "criterion": "length", "weight": 0.1, "threshold": 1.01, "max_length": 4054,
        "no_success": False, "no_failure": True,
    },
    "llm_paper": {
        "mode": "amplify", "criterion": "and", "weight": 2.0, "threshold": 0.5, "max_length": None,
        "no_success": False, "no_failure": True,
    },
}  # fmt: skip


def advantageous(
    outcome: Float[Tensor, " N"],
    length: Int[Tensor, " N"],
    groups: Groups,
    *,
    criterion: Criterion,
    threshold: float,
    max_length: float | None,
    no_success: bool,
    no_failure: bool,
    max_success_rate: float = 0.5,
) -> Bool[Tensor, " P"]:
    """Equations (1) to (4): which groups are temporarily advantageous samples.

    Args:
        outcome: rewards.
        length: decisions of each trajectory.
        groups: the groups.
        criterion: by length, difficulty, both or either.
        threshold: rewards above it are successes.
        max_length: failures of this length or more were cut off, and are ignored.
        no_success: the label by length of a group without successes.
        no_failure: the label by length of a group without failures.
        max_success_rate: tau, the success rate up to which a group is difficult.
    """
    success = outcome > threshold
    failure = ~success & (length < (torch.inf if max_length is None else max_length))
    successes, failures = groups.sum(success.double()), groups.sum(failure.double())
    longest = groups.max(torch.where(success, length.double(), -torch.inf))
    mean_failure = groups.sum(torch.where(failure, length.double(), 0.0)) / failures.clamp(min=1)
    by_length = torch.where(failures > 0, longest > mean_failure, no_failure)
    by_length = torch.where(successes > 0, by_length, no_success)
    by_difficulty = successes / groups.size <= max_success_rate
    match criterion:
        case "length":
            return by_length
        case "difficulty":
            return by_difficulty
        case "and":
            return by_length & by_difficulty
        case "or":
            return by_length | by_difficulty


def group_weights(
    label: Bool[Tensor, " P"], mode: Literal["attenuate", "amplify"], weight: float
) -> Float[Tensor, " P"]:
    """Equation (5): the weight of each group, float64."""
    return torch.where(label if mode == "amplify" else ~label, weight, torch.ones((), dtype=torch.float64))


@register("adora")
class RolloutAdaptation(AdvantageTransform):
    """Weights the groups of any estimator's advantages, equations (1) to (6)."""

    reconstructed = 'the combination "and" of preset llm_paper'

    class Config(Settings):
        """Options of the weighting; unset ones are the preset's."""

        preset: Literal["vlm", "llm_code", "llm_paper"] = "llm_paper"
        """Where unset options come from."""
        mode: Literal["attenuate", "amplify"] | None = None
        """Weight the disadvantageous groups down, or the advantageous ones up."""
        criterion: Criterion | None = None
        """What makes a group advantageous."""
        weight: float | None = Field(None, ge=0)
        """w: 0.1 to attenuate, 2 to amplify."""
        threshold: float | None = None
        """Rewards above it are successes."""
        max_length: float | None = Field(None, gt=0)
        """Failures of this many decisions or more are ignored: set it to the length limit less 2."""
        no_success: bool | None = None
        """Label by length of a group without a success."""
        no_failure: bool | None = None
        """Label by length of a group without a failure."""
        max_success_rate: float = Field(0.5, ge=0, le=1)
        """Success rate up to which a group counts as difficult."""
        normalize: bool = False
        """Divide the weights by their mean over trajectories, so that the average step stays."""

    def forward(self, batch: Batch, advantages: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        c = self.config
        given = {k: v for k, v in dict(c).items() if v is not None and k not in ("preset", "normalize")}
        options = PRESETS[c.preset] | given
        mode, weight = options.pop("mode"), float(options.pop("weight"))  # type: ignore[arg-type]
        groups = Groups.of(batch.group)
        label = advantageous(batch.outcome(), batch.lengths, groups, **options)  # type: ignore[arg-type]
        weights = groups.broadcast(group_weights(label, mode, weight)).to(advantages)  # type: ignore[arg-type]
        if c.normalize:
            weights = weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)
        return weights[:, None] * advantages


@register_recipe("adora")
def adora() -> Method:
    """ADORA over GRPO with a KL of 0.001 in the loss."""
    return Method(
        advantage=[GroupStandardized(), RolloutAdaptation()],
        surrogate=PPOClip(aggregation="sequence_mean"),
        regularizers=[KLPenalty(coef=0.001)],
        defaults={"minibatches": 2},
    )
