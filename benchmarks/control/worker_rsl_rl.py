"""rsl-rl's side, in an environment of its own (`--peers-python`).

Its PPO is for continuous actions: on CartPole the sign of a Gaussian action says left or right. What it cannot do alike:
it clips the gradients of policy and critic apart, keeps one permutation for all passes, adds the discounted value of the
state before a time limit, and updates the moments of observations after an iteration. Rewards are normalised by
Gymnasium's wrapper. Networks begin with torch's weights.
"""

import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import vector
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from settings import (
    ENVIRONMENTS,
    MAX_GRAD_NORM,
    PER_ITERATION,
    SETTINGS,
    STEPS,
    TASKS,
    VALUE_COEF,
    mean_return,
    run,
    start_together,
)  # fmt: skip
from tensordict import TensorDict


class Adapter(VecEnv):
    """Gymnasium's environments as rsl-rl sees them: a new episode begins in the step that ends the last one."""

    def __init__(self, env: str, seed: int) -> None:
        same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        self.made: Any = gym.make_vec(env, ENVIRONMENTS, "sync", vector_kwargs=same_step)
        self.space: Any = self.made.single_action_space
        self.max_episode_length = self.made.spec.max_episode_steps
        if TASKS[env]:
            rewards = vector.NormalizeReward(self.made, SETTINGS["gamma"])
            self.made = vector.TransformReward(rewards, lambda reward: np.clip(reward, -10, 10))
        self.num_envs, self.num_actions = ENVIRONMENTS, self.space.shape[0] if self.space.shape else 1
        self.episode_length_buf = torch.zeros(ENVIRONMENTS, dtype=torch.long)
        self.device, self.cfg = "cpu", {}
        self.seen = grouped(self.made.reset(seed=seed)[0])

    def get_observations(self) -> TensorDict:
        return self.seen

    def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict]:
        observation, reward, terminated, truncated, _ = self.made.step(taken(actions, self.space))
        self.seen, ended = grouped(observation), torch.as_tensor(terminated | truncated)
        self.episode_length_buf = (self.episode_length_buf + 1) * ~ended
        timed_out = torch.as_tensor(truncated & ~terminated, dtype=torch.float32)
        return self.seen, torch.as_tensor(reward, dtype=torch.float32), ended, {"time_outs": timed_out}


def grouped(observation: Any) -> TensorDict:
    """The one group of observations, for policy and critic."""
    seen = torch.as_tensor(observation, dtype=torch.float32)
    return TensorDict({"state": seen}, batch_size=seen.shape[:1])


def taken(actions: torch.Tensor, space: Any) -> Any:
    """As the environments take them, from [N, A]."""
    if isinstance(space, gym.spaces.Discrete):
        return (actions[:, 0] > 0).long().numpy()
    return actions.numpy().clip(space.low, space.high)


def configuration(normalized: bool) -> dict[str, Any]:
    """The library's names for the settings."""
    network = {
        "class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "tanh",
        "obs_normalization": normalized,
    }  # fmt: skip
    return {
        "algorithm": {
            "class_name": "PPO", "learning_rate": SETTINGS["lr"], "schedule": "fixed",
            "num_learning_epochs": int(SETTINGS["epochs"]),
            "num_mini_batches": PER_ITERATION // int(SETTINGS["minibatch"]),
            "gamma": SETTINGS["gamma"], "lam": SETTINGS["gae_lambda"], "clip_param": SETTINGS["clip"],
            "max_grad_norm": MAX_GRAD_NORM, "value_loss_coef": VALUE_COEF, "entropy_coef": 0.0,
            "use_clipped_value_loss": False, "normalize_advantage_per_mini_batch": True,
        },
        "actor": network | {"distribution_cfg": {"class_name": "GaussianDistribution", "std_type": "log"}},
        "critic": network,
        "obs_groups": {"actor": ["state"], "critic": ["state"]},
        "num_steps_per_env": STEPS,
        "save_interval": 1,
    }  # fmt: skip


def train(env: str, seed: int, iterations: int) -> dict[str, float]:
    """Train and score."""
    torch.manual_seed(seed)
    made = Adapter(env, seed)
    runner = OnPolicyRunner(made, configuration(TASKS[env]))
    start_together()
    started = time.process_time()
    runner.learn(iterations)
    seconds = time.process_time() - started
    policy = runner.get_inference_policy("cpu")

    @torch.no_grad()
    def act(observation: Any) -> Any:
        return taken(policy(grouped(observation[None])), made.space)[0]

    return {
        "steps_per_second": iterations * PER_ITERATION / seconds,
        "return": mean_return(act, env, seed + 1000),
    }


if __name__ == "__main__":
    run(train)
