"""Off-policy methods in environments: exact resume, the reduction to soft actor-critic, gradients, refusals, learning."""

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from polopt.batch import Batch
from polopt.cli import main
from polopt.cli.building import build, close
from polopt.config import RunConfig, configure
from polopt.control.networks import CRITIC, POLICY
from polopt.control.off_policy_actor import OffPolicyActor
from polopt.control.off_policy_networks import OffPolicyNetworks
from polopt.domain import Plan
from polopt.errors import ConfigError
from polopt.testing.compare import same
from polopt.trainer import Trainer
from tests.control.test_training import stopping_after

EQUAL = "soft_mirror:temperature=0.2,inverse_step=0.2"
MIRROR = "soft_mirror:temperature=0.2,inverse_step=1.0,steps=10"
FRESH = frozenset({"fresh_logp", "fresh_old_logp", "fresh_q", "q", "value", "next_value", "squared_outputs"})


def trainer(out: Path | None = None, **options: Any) -> Trainer:
    """A small run on a pendulum, whose buffer is soon full."""
    sizes = {
        "iterations": 4,
        "buffer_size": 50,
        "batch_size": 8,
        "learning_starts": 20,
        "checkpoint_every": 2,
    }
    sizes |= {"score_prompts": 2, **options.pop("trainer", {})}
    control = {"horizon": 20, "hidden": [16, 16], **options.pop("control", {})}
    options = {"method": "sac", "domain": "control", "task": "Pendulum-v1", **options}
    return build(RunConfig.create("", trainer=sizes, control=control, **options), out=out)


def trained(iterations: int = 4, **options: Any) -> Trainer:
    run = trainer(**options)
    for _ in range(iterations):
        run.iterate()
    close(run)
    return run


def networks(run: Trainer) -> OffPolicyNetworks:
    assert isinstance(run.actor, OffPolicyActor)
    return run.actor.module


def state(run: Trainer, without: str = "-") -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in networks(run).state_dict().items() if not n.startswith(without)}


def a_minibatch(run: Trainer) -> Batch:
    draws = torch.Generator().manual_seed(0)
    assert isinstance(run.actor, OffPolicyActor)
    return run.actor.redraw(run.update.buffer.draw(8, draws), draws)


@pytest.mark.parametrize("slots", [{}, {"method": "mdpo-off", "surrogate": MIRROR}], ids=["sac", "mdpo"])
def test_a_resumed_run_is_the_uninterrupted_one(slots: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", **slots)
    whole.run()
    first = trainer(tmp_path / "parts", **slots)
    first.iterate = stopping_after(first, 3)
    first.run()
    second = trainer(tmp_path / "parts", **slots)
    second.run(resume=True)
    for run in (whole, first, second):
        close(run)
    assert second.iteration == whole.iteration == 4
    assert len(whole.update.buffer) == 50 and whole.update.buffer.seen == 80
    same(state(second), state(whole))
    same(second.update.buffer.state_dict()["columns"], whole.update.buffer.state_dict()["columns"])


def test_equal_weights_of_entropy_and_divergence_are_soft_actor_critic_to_the_bit() -> None:
    sac = trained()
    same(state(trained(method="mdpo-off", surrogate=EQUAL), "followers"), state(sac, "followers"))
    other = state(trained(method="mdpo-off", surrogate=MIRROR))
    assert not torch.equal(other["policy.weight"], state(sac)["policy.weight"])


def test_the_old_policy_is_that_of_the_last_mirror_step_and_the_target_follows_the_value() -> None:
    run = trainer(
        method="mdpo-off", surrogate="soft_mirror:steps=20", regularizers=["soft_critics:polyak=1.0"]
    )
    found = networks(run)
    start = found.followers[1].weight.clone()
    for iteration in range(4):  # 20 updates each, the first of them in the first iteration
        run.iterate()
        assert int(found.updates) == 20 * (iteration + 1)
        assert torch.equal(found.followers[1].weight, found.policy.weight)
        assert found.value is not None and torch.equal(found.followers[2].weight, found.value.weight)
    assert not torch.equal(start, found.followers[1].weight)
    close(run)


def test_the_target_moves_by_its_share_in_each_step_and_the_old_policy_waits() -> None:
    run = trainer()
    found, before = networks(run), state(run)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(parameter.requires_grad)  # by 1, what is trained
    for step in range(1, 4):
        found.follow(0.25, 3)
        moved = 1 - 0.75**step
        assert_close(found.followers[2].weight, before["followers.2.weight"] + moved)
        assert_close(found.followers[1].weight, before["followers.1.weight"] + (step == 3))
    close(run)


def test_micro_batches_change_nothing() -> None:
    whole, pieces = (trained(control={"dtype": "float64", "micro_batch": size}) for size in (4096, 3))
    for one, other in zip(state(pieces).values(), state(whole).values(), strict=True):
        assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_each_loss_reaches_its_own_parameters() -> None:
    run = trained(method="mdpo-off", surrogate=MIRROR)
    batch = a_minibatch(run)
    batch.loss_weight = run.method.surrogate.loss_weights(batch)
    evaluation = run.actor.evaluate(batch, FRESH)
    critics, penalty = run.method.slot("regularizers")
    losses = {
        ("hidden of the policy", "policy"): run.method.surrogate(evaluation, batch)
        + penalty(evaluation, batch),
        ("critics", "value", "hidden of the value"): critics(evaluation, batch),
    }
    for owners, loss in losses.items():
        run.actor.module.zero_grad()
        loss.backward(retain_graph=True)
        gradients = [
            (name.split(".")[0], p.grad)
            for name, p in run.actor.module.named_parameters()
            if p.grad is not None
        ]
        reached = {name for name, gradient in gradients if name != "hidden" and bool(gradient.any())}
        for name, gradient in gradients:
            if name == "hidden":
                reached |= {"hidden of the policy"} if bool(gradient[POLICY].any()) else set()
                reached |= {"hidden of the value"} if bool(gradient[CRITIC].any()) else set()
        assert reached == set(owners)


def test_fresh_decisions_have_the_density_of_a_squashed_gaussian() -> None:
    run = trained(method="mdpo-off", surrogate=MIRROR, control={"dtype": "float64"})
    found, batch = networks(run), a_minibatch(run)
    seen, noise = batch.payload["observation"][:, 0], batch.payload["noise"][:, 0]
    evaluation = run.actor.evaluate(batch, FRESH)
    mean, log_std = found.distribution_outputs(found.hidden.alone(POLICY)(seen)).chunk(2, -1)
    drawn = mean + log_std.exp() * noise
    for name, outputs in (
        ("fresh_logp", (mean, log_std)),
        ("fresh_old_logp", found.old_outputs(seen).chunk(2, -1)),
    ):
        squashed = TransformedDistribution(Normal(outputs[0], outputs[1].exp()), TanhTransform(cache_size=1))
        action = squashed.transforms[0](drawn)  # pyright: ignore[reportIndexIssue]
        assert_close(getattr(evaluation, name), squashed.log_prob(action))
    assert_close(evaluation.fresh_q[:, 0], found.critics(seen, drawn.tanh()))
    assert_close(evaluation.q[:, 0], found.critics(seen, batch.payload["action"][:, 0].tanh()))
    assert_close(evaluation.squared_outputs, mean.square() + log_std.square())


def test_decisions_know_the_state_that_they_led_to() -> None:
    run = trainer(control={"horizon": 250}, trainer={"rollouts": 2})
    batch = run.actor.rollout(run.task, Plan(torch.arange(1), torch.tensor([2])), torch.Generator()).batch
    close(run)
    payload = batch.payload
    assert (
        batch.lengths.tolist() == [200, 200, 50, 50] and batch.truncated.tolist() == [True] * 2 + [False] * 2
    )
    assert not bool(batch.terminated.any())
    for row, length in enumerate(batch.lengths.tolist()):
        assert torch.equal(
            payload["next_observation"][row, : length - 1], payload["observation"][row, 1:length]
        )
        assert torch.equal(payload["next_observation"][row, length - 1], payload["final_observation"][row])


def environment_actions(run: Trainer, seed: int) -> torch.Tensor:
    """Those of 2000 decisions, in [-1, 1]."""
    plan = Plan(torch.arange(1), torch.tensor([100]))
    batch = run.actor.rollout(run.task, plan, torch.Generator().manual_seed(seed)).batch
    return batch.payload["action"][batch.mask].tanh()


def test_actions_are_uniform_before_the_first_update_and_the_policys_after_it() -> None:
    run = trainer()
    uniform = environment_actions(run, 0)
    below = (uniform[:, 0, None] < torch.tensor([-0.9, -0.5, 0.0, 0.5, 0.9])).double().mean(0)
    assert_close(below, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double(), rtol=0, atol=0.05)
    own, later = trainer(control={"uniform_start": False}), trainer()
    networks(later).follow(0.005, 0)
    drawn = environment_actions(own, 0)
    assert torch.equal(environment_actions(later, 0), drawn) and not torch.equal(drawn, uniform)
    for one in (run, own, later):
        close(one)


def test_a_deterministic_collector_takes_the_mode() -> None:
    run = trainer(control={"uniform_start": False, "collect_policy": "deterministic"})
    plan = Plan(torch.arange(1), torch.tensor([2]))
    batch = run.actor.rollout(run.task, plan, torch.Generator()).batch
    close(run)
    with torch.no_grad():
        found = networks(run)
        outputs = found.distribution_outputs(found.hidden.alone(POLICY)(batch.payload["observation"]))
    assert_close(batch.payload["action"], outputs[..., :1])


def test_nothing_is_learned_before_learning_starts_and_as_often_as_asked_after() -> None:
    run = trainer(trainer={"learning_starts": 40, "update_ratio": 0.5})
    assert [run.iterate()[0]["updates"] for _ in range(3)] == [0.0, 10.0, 10.0]
    close(run)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trainer": {"buffer_size": 0}}, "trainer.buffer_size = 0: surrogate sac needs replayed"),
        ({"method": "ppo"}, "trainer.buffer_size = 50: surrogate ppo needs decisions of the present policy"),
        ({"method": "reinforce"}, "trainer.buffer_size = 50: surrogate reinforce needs decisions"),
        ({"surrogate": "ppo"}, "needs the signal 'temperature'"),
        ({"surrogate": "sac:aggregation=sequence_mean_token_sum"}, "needs aggregation=token_mean"),
        ({"optimizer": "snr"}, "optimizer snr: needs whole rollouts"),
        ({"trainer": {"epochs": 4}}, "trainer.epochs = 4: a replay buffer needs 1"),
        ({"trainer": {"sharding": "fsdp2"}}, "sharding = 'fsdp2'"),
        ({"task": "CartPole-v1"}, "task = 'CartPole-v1': its actions are Discrete"),
        ({"task": "CartPole-v1"}, "--env Pendulum-v1"),
        (
            {"domain": "language", "task": "builtin:largest"},
            "method = 'sac': works on control, not on language; use --domain control",
        ),
        (
            {"trainer": {"learning_starts": 81}},
            "trainer.learning_starts = 81: the run collects 80 decisions only",
        ),
        ({"trainer": {"learning_starts": 81}}, "at most 80, or trainer.iterations to at least 5"),
        ({"task": "polopt/LQR-v0"}, "off-policy methods need continuous actions with bounds"),
        ({"control": {"distribution": "gaussian"}}, "control.distribution = 'gaussian'"),
        ({"control": {"normalize_rewards": True}}, "control.normalize_rewards = true"),
        ({"control": {"horizon": 0}}, "control.horizon = 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        trainer(**options)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_last_iteration_alone_may_learn() -> None:
    run = trainer(trainer={"learning_starts": 80})
    assert [run.iterate()[0]["updates"] for _ in range(4)] == [0.0, 0.0, 0.0, 20.0]
    close(run)


def test_a_run_that_only_scores_needs_no_decisions() -> None:
    run = trainer(trainer={"iterations": 0})
    close(run)


def test_unclipped_gradients_are_standard_json_in_the_run_folder_and_come_back(tmp_path: Path) -> None:
    run = trainer(tmp_path, trainer={"iterations": 1})
    run.run()
    close(run)
    assert run.config.max_grad_norm == math.inf

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert configure(found).trainer.max_grad_norm == math.inf


def test_a_methods_defaults_go_before_the_domains_and_the_users_before_both() -> None:
    made = {"method": "sac", "domain": "control", "task": "Pendulum-v1"}
    for given, norm in (({}, math.inf), ({"max_grad_norm": 0.5}, 0.5)):
        run = build(RunConfig.create("", trainer=given, **made))
        close(run)
        assert run.config.max_grad_norm == norm and run.config.score_prompts == 16
        assert networks(run).policy.in_features == 256


class Aim(gym.Env[np.ndarray, np.ndarray]):
    """One decision: hit the number that is seen."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.goal = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.goal.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.goal.copy(), -float(np.square(action - self.goal).sum()), True, False, {}


@pytest.mark.parametrize("method", ["sac", "mdpo-off"])
def test_it_learns_to_aim(method: str) -> None:
    """The loss of a policy that does not look is at least 1/3."""
    if "polopt-test/Aim-v0" not in gym.registry:
        gym.register("polopt-test/Aim-v0", Aim)
    sizes = {"iterations": 12, "batch_size": 64, "buffer_size": 1000, "learning_starts": 100, "lr": 3e-3}
    run = trainer(
        method=method,
        task="polopt-test/Aim-v0",
        trainer={**sizes, "score_prompts": 32},
        control={"horizon": 50, "hidden": [32, 32]},
    )
    before = run.score()["score"]
    for _ in range(run.config.iterations):
        run.iterate()
    after = run.score()["score"]
    close(run)
    assert before < -0.25 and after > -0.1


def test_the_command_line_trains_scores_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    sizes = ["--iterations", "2", "--horizon", "20", "--score-prompts", "2", "--learning-starts", "20"]
    sizes += ["--batch-size", "8", "--hidden", "16", "--hidden", "16"]
    flags = ["--domain", "control", "--method", "mdpo-off", "--env", "Pendulum-v1", *sizes]
    assert main(["train", *flags, "--dry-run"]) == 0
    assert "buffer_size = 1000000" in capsys.readouterr().out
    assert main(["train", *flags, "--out", out, "--quiet"]) == 0
    assert main(["resume", out, "--iterations", "3", "--quiet"]) == 0
    assert main(["eval", out]) == 0
    assert "iteration 3" in capsys.readouterr().out
    assert main(["train", "--domain", "control", "--method", "sac", "--env", "CartPole-v1"]) == 2
    assert "task = 'CartPole-v1'" in capsys.readouterr().err
