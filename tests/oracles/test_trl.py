"""TRL's GRPO and RLOO trainers on the same batches: advantages, losses and gradients agree to 1e-6 in float64.

TRL's mathematics lies inside methods of its trainers, which are called here on a stand-in for the trainer that has the
attributes they read. Where the two libraries differ, the test says how, and sets ours to TRL's choice:

- the standard deviation is unbiased in both; TRL adds 1e-4 to it, ours adds 1e-6 by default;
- a trajectory without decisions counts as one in TRL's mean over sequences, and is left out in ours;
- Dr. GRPO divides by the length limit in TRL, by the longest trajectory of the minibatch in ours unless `constant` is set;
- `epsilon_high` of CISPO is the largest weight itself in TRL, what it may exceed 1 by in ours;
- the KL in TRL's loss is by default multiplied by the ratio (`use_bias_correction_kl`), in ours never;
- RLOO in TRL has the ratio of whole sequences, not the score function: on fresh data the gradient is the same, the
  value is not;
- TRL's groups all have the same size; a trajectory whose rewards are all missing has advantage 0 in TRL, and is dropped
  by ours.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.trl_stand_in import StandIn
from polopt.batch import Batch
from polopt.methods.advantage.gdpo import DecoupledNormalized
from polopt.methods.classics.cispo import ClippedWeight
from polopt.methods.classics.dr_grpo import GroupCentred
from polopt.methods.classics.entropy import EntropyBonus
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.gspo import SequenceClip
from polopt.methods.classics.kl import KLPenalty, KLReward
from polopt.methods.classics.ppo import PPOClip
from polopt.methods.classics.reinforce import ScoreFunction
from polopt.methods.classics.rloo import LeaveOneOut
from polopt.parts import Advantage
from polopt.testing.subject import draws
from tests.oracles.common import LIMITS, SEEDS, evaluate, other_library, our_loss, ragged_batch

grpo_trainer = other_library("trl.trainer.grpo_trainer")
rloo_trainer = other_library("trl.trainer.rloo_trainer")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::FutureWarning")]
each_seed = pytest.mark.parametrize("seed", SEEDS)


def settings_of(trainer: str, **options: Any) -> Any:
    """The trainer's configuration, with defaults for the rest."""
    config = grpo_trainer.GRPOConfig if trainer == "grpo" else rloo_trainer.RLOOConfig
    return config(output_dir="unused", report_to=[], use_cpu=True, bf16=False, **options)


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What TRL's losses read of a batch."""
    ids = torch.zeros(batch.mask.shape, dtype=torch.int64)
    return {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": batch.mask.long(), "advantages": batch.advantages[:, 0], "old_per_token_logps": batch.old_logp,
        "ref_per_token_logps": batch.ref_logp, "num_items_in_batch": batch.mask.sum(),
        "old_logps": batch.old_logp.sum(-1),
    }  # fmt: skip


def their_loss(
    batch: Batch, trainer: str = "grpo", entropy_coef: float = 0.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient with respect to the log-probabilities."""
    args = settings_of(trainer, **options)
    logp, entropy = evaluate(batch)
    stand_in = StandIn(
        args=args, model=torch.nn.Identity().train(), current_gradient_accumulation_steps=1,
        epsilon_low=args.epsilon, epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        beta=args.beta, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        max_completion_length=args.max_completion_length, entropy_coef=entropy_coef,
        _entropy_bonus_enabled=entropy_coef > 0, use_adaptive_entropy=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, entropy, None),
    )  # fmt: skip
    if trainer == "grpo":
        stand_in.__dict__.update(
            loss_type=args.loss_type, importance_sampling_level=args.importance_sampling_level
        )
        args.steps_per_generation = 1
    owner = grpo_trainer.GRPOTrainer if trainer == "grpo" else rloo_trainer.RLOOTrainer
    loss = owner._compute_loss(stand_in, stand_in.model, inputs_of(batch))
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def their_advantages(batch: Batch, trainer: str = "grpo", **options: Any) -> Tensor:
    """TRL's advantages [N] of groups of four."""
    args = settings_of(trainer, **options)
    rows, columns = batch.rewards.shape
    lists = [[1] * int(length) for length in batch.lengths]
    generated = ([[1]] * rows, lists, None, [""] * rows, None, {}, None, None)
    kept = [batch.old_logp, batch.ref_logp]  # in the order in which the trainer evaluates them
    stand_in = StandIn(
        args=args, model=StandIn(training=True), environment_factories=None, num_generations=4, beta=args.beta,
        num_iterations=1, reward_weights=torch.ones(columns, dtype=torch.float64), reward_funcs=[None] * columns,
        reward_func_names=[str(k) for k in range(columns)], pad_to_multiple_of=None, use_vllm=False,
        _tokenizer=StandIn(pad_token_id=0), _generate=lambda prompts: generated if trainer == "grpo" else (*generated[:2], [""] * rows),
        _get_per_token_logps_and_entropies=lambda *a, **k: (kept.pop(0), None, None),
        _calculate_rewards=lambda *a: batch.rewards.clone(), ref_model=True,
        normalize_advantages=getattr(args, "normalize_advantages", False), reward_clip_range=None,
        multi_objective_aggregation=getattr(args, "multi_objective_aggregation", ""),
        scale_rewards=getattr(args, "scale_rewards", ""),
    )  # fmt: skip
    owner = grpo_trainer.GRPOTrainer if trainer == "grpo" else rloo_trainer.RLOOTrainer
    made = owner._generate_and_score_completions(stand_in, [{"prompt": "x"} for _ in range(rows)])
    return made["advantages"]


def ours(part: Advantage, batch: Batch) -> Tensor:
    return part(batch)[:, 0]


@each_seed
@pytest.mark.parametrize(
    ("part", "options"),
    [
        (GroupStandardized(eps=1e-4), {}),
        (GroupCentred(), {"scale_rewards": "none"}),
        (DecoupledNormalized(), {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
    ids=["grpo", "dr_grpo", "gdpo"],
)
def test_group_relative_advantages_agree(part: Advantage, options: dict[str, Any], seed: int) -> None:
    batch = ragged_batch(seed)
    batch.rewards = torch.cat([batch.rewards, batch.rewards.flip(0).square()], 1)
    assert_close(ours(part, batch), their_advantages(batch, **options), **LIMITS)


@each_seed
def test_leave_one_out_advantages_agree_with_the_kl_in_the_reward_too(seed: int) -> None:
    batch = ragged_batch(seed, requires=frozenset({"ref_logp"}))
    batch.mask = torch.arange(batch.mask.shape[1]) < batch.lengths[:, None]  # TRL's RLOO has no gaps
    assert_close(ours(LeaveOneOut(), batch), their_advantages(batch, "rloo", beta=0.0), **LIMITS)
    shaped = KLReward(coef=0.3, estimator="k1")(batch, draws(0))
    assert_close(ours(LeaveOneOut(), shaped), their_advantages(batch, "rloo", beta=0.3), **LIMITS)


def test_constant_groups_and_missing_rewards_agree_where_a_trajectory_is_kept() -> None:
    batch = ragged_batch(0)
    batch.rewards[:4] = 0.1
    batch.rewards[5] = torch.nan
    kept = ~batch.rewards[:, 0].isnan()
    for part, trainer in ((GroupStandardized(eps=1e-4), "grpo"), (LeaveOneOut(), "rloo")):
        theirs = their_advantages(batch, trainer, beta=0.0)
        assert_close(ours(part, batch[kept]), theirs[kept], **LIMITS)
        assert theirs[5] == 0
        assert not ours(part, batch[kept])[:4].any()


@each_seed
@pytest.mark.parametrize(
    ("surrogate", "options"),
    [
        (PPOClip(aggregation="sequence_mean"), {"loss_type": "grpo"}),
        (PPOClip(aggregation="token_mean"), {"loss_type": "bnpo"}),
        (PPOClip(clip_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
        (PPOClip(aggregation="constant", constant=64), {"loss_type": "dr_grpo", "max_completion_length": 64}),
        (
            SequenceClip(clip_low=0.03, clip_high=0.04),
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 0.03,
                "epsilon_high": 0.04,
            },
        ),
        (
            SequenceClip(variant="token"),
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 3e-4,
                "epsilon_high": 4e-4,
            },
        ),
        (ClippedWeight(clip_high=0.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
    ],
    ids=["grpo", "token_mean", "dapo", "dr_grpo", "gspo", "gspo_token", "cispo"],
)
def test_losses_and_gradients_agree(surrogate: Any, options: dict[str, Any], seed: int) -> None:
    loss, gradient, batch = our_loss(surrogate, ragged_batch(seed, groups=(4, 2, 5)))
    their, their_gradient = their_loss(batch, **options)
    assert_close(loss, their, **LIMITS)
    assert_close(gradient, their_gradient, **LIMITS)
    assert gradient.abs().max() > 1e-4


@each_seed
def test_kl_in_the_loss_agrees_without_its_correction(seed: int) -> None:
    raw = ragged_batch(seed, requires=frozenset({"ref_logp"}))
    loss, gradient, batch = our_loss(PPOClip(aggregation="sequence_mean"), raw, (KLPenalty(coef=0.2),))
    their = their_loss(batch, loss_type="grpo", beta=0.2, use_bias_correction_kl=False)
    assert_close((loss, gradient), their, **LIMITS)
    corrected = their_loss(batch, loss_type="grpo", beta=0.2)[1]
    assert not torch.allclose(gradient, corrected, rtol=1e-3)


@each_seed
def test_rloo_gradient_agrees_on_fresh_data(seed: int) -> None:
    batch = ragged_batch(seed)
    batch.old_logp = evaluate(batch)[0].detach()
    _, gradient, batch = our_loss(ScoreFunction(aggregation="sequence_mean_token_sum"), batch)
    their = their_loss(batch, "rloo")[1]
    assert_close(gradient, torch.where(batch.mask, their, 0.0), **LIMITS)


def test_entropy_bonus_agrees() -> None:
    loss, gradient, batch = our_loss(PPOClip(), ragged_batch(0), (EntropyBonus(coef=0.5),))
    assert_close((loss, gradient), their_loss(batch, loss_type="bnpo", entropy_coef=0.5), **LIMITS)


def test_trajectories_without_decisions_count_in_theirs_alone() -> None:
    raw = ragged_batch(0)
    raw.mask[3] = False
    loss, _, batch = our_loss(PPOClip(aggregation="sequence_mean"), raw)
    their, _ = their_loss(batch, loss_type="grpo")
    assert_close(their, loss * (len(batch) - 1) / len(batch), **LIMITS)
