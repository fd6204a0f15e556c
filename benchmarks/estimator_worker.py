"""One library's advantages and losses on the benchmark's tensors: a name arrives, its milliseconds leave.

    python benchmarks/estimator_worker.py polopt|verl|trl ROWS LENGTH GROUP

The first line written is the JSON list of the names. Threads are those of OMP_NUM_THREADS.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from trl_stand_in import StandIn

warnings.simplefilter("ignore")
Task = Callable[[], Any]
NEED_SCORES = {"bayesian", "gptd"}
"""Estimators that read the policy's gradient at every decision: their cost is that of the network."""


def tensors(rows: int, length: int, group: int) -> dict[str, Tensor]:
    """The same for every library: float32, ragged, rewards of 0 and 1, groups side by side."""
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 8, length + 1, (rows,), generator=draws)
    mask = torch.arange(length) < lengths[:, None]
    rewards = torch.randint(2, (rows,), generator=draws).float()
    old_logp = -torch.rand(rows, length, generator=draws) * mask
    return {
        "mask": mask,
        "rewards": rewards,
        "token_rewards": torch.zeros(rows, length).scatter_(1, lengths[:, None] - 1, rewards[:, None]),
        "group": torch.arange(rows) // group,
        "old_logp": old_logp,
        "logp": old_logp + 0.1 * torch.randn(rows, length, generator=draws) * mask,
        "noise": torch.randn(rows, length, generator=draws),
    }


def backward(loss: Callable[[Tensor], Tensor], logp: Tensor) -> Tensor:
    """The loss and its gradient with respect to the log-probabilities."""
    leaf = logp.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def polopt_tasks(given: dict[str, Tensor]) -> Iterator[tuple[str, Task]]:
    """Every advantage estimator and every surrogate that is registered, on a batch with all they may require."""
    from polopt.functional.masked import given_to_decisions, zero_outside
    from polopt.method import Method
    from polopt.parts import AdvantageTransform
    from polopt.registry import parts, recipe, recipes
    from polopt.testing.subject import draws

    def masked(advantages: Tensor) -> Tensor:
        advantages = advantages.to(given["old_logp"])
        one = advantages.shape[1] == 1
        return (
            given_to_decisions(advantages, given["mask"]) if one else zero_outside(advantages, given["mask"])
        )

    def method_with(slot: str, name: str) -> Method:
        first = [known for known in (name, "grpo") if known in recipes()]
        methods = (recipe(known) for known in [*first, *recipes()])
        found = (m for m in methods if any(part.name == name for part in m.slot(slot)))
        method = next(found, None)
        return recipe("grpo", None, **{slot: name}) if method is None else method

    for name, part_class in parts("advantage").items():
        if name in NEED_SCORES:
            continue
        method = method_with("advantage", name)
        batch = polopt_batch(given)
        for shaping in method.shaping:
            batch = shaping(batch, draws(0))
        estimator, *transforms = method.advantage
        if issubclass(part_class, AdvantageTransform):
            part = next(part for part in transforms if part.name == name)
            base = masked(estimator(batch))
            yield f"advantage {name}", lambda part=part, batch=batch, base=base: masked(part(batch, base))
        else:
            yield f"advantage {name}", lambda part=estimator, batch=batch: masked(part(batch))
            if name == "grpo":
                dense = polopt_batch(given)
                dense.rewards = torch.zeros_like(dense.rewards)
                dense.step_rewards = given["token_rewards"]
                yield (
                    "advantage grpo of token rewards",
                    lambda part=estimator, batch=dense: masked(part(batch)),
                )
    for name in parts("surrogate"):
        method = method_with("surrogate", name).with_parts(regularizers=[], selection=parts_default())
        yield f"surrogate {name}", surrogate_task(method, polopt_batch(given), given["logp"])


def parts_default() -> Any:
    """The selection that keeps everything."""
    from polopt.parts import Selection

    return Selection()


def polopt_batch(given: dict[str, Tensor]) -> Any:
    """A batch with every optional field that an estimator or a surrogate reads."""
    from polopt.batch import Batch

    rows, noise = len(given["mask"]), given["noise"]
    batch = Batch(
        mask=given["mask"], old_logp=given["old_logp"], rewards=given["rewards"][:, None].double(),
        group=given["group"], prompt_id=given["group"], batch_size=[rows],
    )  # fmt: skip
    batch.ref_logp, batch.old_value = given["old_logp"] + 0.1 * noise, 0.5 + 0.1 * noise
    batch.old_entropy = noise.abs()
    batch.task, batch.answer = given["group"] % 4, given["group"] % 3
    for name in ("old_tempered_logp", "old_median"):
        batch.set_signal(name, given["old_logp"] - 0.01 * noise.abs())
    batch.set_signal("old_score_sqnorm", noise.square())
    return batch


def surrogate_task(method: Any, batch: Any, logp: Tensor) -> Task:
    """Forward and backward of a surrogate on the prepared batch."""
    from polopt.batch import Evaluation
    from polopt.testing.subject import prepared

    batch = prepared(method, batch)
    values = {
        "value": batch.old_value + 0.1,
        "entropy": batch.old_entropy,
        "median": batch.old_value,
        "kl": batch.old_entropy,
    }
    extra = {name: tensor for name, tensor in values.items() if name in method.evaluated}
    logp = logp[: len(batch)]
    return lambda: backward(lambda leaf: method.objective(Evaluation(leaf, **extra), batch), logp)


def verl_tasks(given: dict[str, Tensor]) -> Iterator[tuple[str, Task]]:
    """verl's advantages in both forms, and its clipped loss."""
    import numpy as np
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    index = np.array([str(g) for g in given["group"].tolist()], dtype=object)
    mask = given["mask"].float()
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        loss_agg_mode="token-mean",
    )
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=len(mask), loss_scale_factor=None
    )
    advantages = core_algos.compute_grpo_vectorized_outcome_advantage(given["token_rewards"], mask, index)[0]
    loops, vectorised = (
        core_algos.compute_grpo_outcome_advantage,
        core_algos.compute_grpo_vectorized_outcome_advantage,
    )
    yield "advantage looped", lambda: loops(given["token_rewards"], mask, index)
    yield "advantage vectorised", lambda: vectorised(given["token_rewards"], mask, index)

    def loss(leaf: Tensor) -> Tensor:
        return core_algos.compute_policy_loss_vanilla(
            given["old_logp"], leaf, advantages, mask, "token-mean", config
        )[0]

    yield "loss", lambda: backward(loss, given["logp"])


def trl_tasks(given: dict[str, Tensor]) -> Iterator[tuple[str, Task]]:
    """TRL's clipped loss, called on a stand-in for its trainer; its advantages are lines inside a method of it."""
    from trl import GRPOConfig, GRPOTrainer

    size = int((given["group"] == 0).sum())
    rewards, mask = given["rewards"], given["mask"].long()

    def advantages() -> Tensor:
        # the same arithmetic: groups of one size side by side, one advantage for each trajectory
        grouped = rewards.view(-1, size)
        mean, std = grouped.mean(1).repeat_interleave(size), grouped.std(1).repeat_interleave(size)
        return (rewards - mean) / (std + 1e-4)

    yield "advantage, one for each trajectory", advantages
    args = GRPOConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False, loss_type="dapo", beta=0.0)
    args.steps_per_generation = 1
    found = advantages()
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": mask, "advantages": found, "old_per_token_logps": given["old_logp"],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip

    def loss(leaf: Tensor) -> Tensor:
        stand_in = trainer_of(args, leaf)
        return GRPOTrainer._compute_loss(stand_in, stand_in.model, inputs)

    yield "loss", lambda: backward(loss, given["logp"])


def trainer_of(args: Any, logp: Tensor) -> StandIn:
    """What TRL's loss reads of its trainer."""
    return StandIn(
        args=args, model=torch.nn.Identity().train(), epsilon_low=0.2, epsilon_high=0.2, beta=0.0,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, use_adaptive_entropy=False,
        _entropy_bonus_enabled=False, loss_type=args.loss_type, importance_sampling_level="token",
        max_completion_length=logp.shape[1], entropy_coef=0.0, current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, logp.detach(), None),
    )  # fmt: skip


def main(library: str, rows: int, length: int, group: int) -> None:
    """Answer requests until the input ends."""
    makers = {"polopt": polopt_tasks, "verl": verl_tasks, "trl": trl_tasks}
    tasks = dict(makers[library](tensors(rows, length, group)))
    print(json.dumps(list(tasks)), flush=True)
    for line in sys.stdin:
        task = tasks[line.rstrip("\n")]
        started = time.perf_counter()
        task()
        print(json.dumps((time.perf_counter() - started) * 1e3), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
