"""Tianshou's side, in an environment of its own (`--peers-python`).

What it cannot do alike: instead of rewards it normalises returns and values, by the deviation of the returns. Networks
begin with orthogonal weights, as in its own examples.
"""

import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from settings import (
    ENVIRONMENTS,
    MAX_GRAD_NORM,
    PER_ITERATION,
    SETTINGS,
    TASKS,
    VALUE_COEF,
    mean_return,
    run,
    start_together,
)  # fmt: skip
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy, ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, VectorEnvNormObs
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from tianshou.utils.net.discrete import DiscreteActor
from torch import nn


def train(env: str, seed: int, iterations: int) -> dict[str, float]:
    """Train and score."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    made: Any = DummyVectorEnv([lambda: gym.make(env) for _ in range(ENVIRONMENTS)])
    if TASKS[env]:
        made = VectorEnvNormObs(made)
    made.seed(seed)
    policy = actor_policy(gym.make(env))
    algorithm = PPO(
        policy=policy, critic=orthogonal(ContinuousCritic(preprocess_net=body(policy.observation_space)), 1.0),
        optim=AdamOptimizerFactory(lr=SETTINGS["lr"]), eps_clip=SETTINGS["clip"], vf_coef=VALUE_COEF,
        ent_coef=0.0, max_grad_norm=MAX_GRAD_NORM, gae_lambda=SETTINGS["gae_lambda"], gamma=SETTINGS["gamma"],
        return_scaling=TASKS[env],
    )  # fmt: skip
    sizes = OnPolicyTrainerParams(
        training_collector=Collector(policy, made, VectorReplayBuffer(PER_ITERATION, ENVIRONMENTS)),
        max_epochs=1, epoch_num_steps=iterations * PER_ITERATION, collection_step_num_env_steps=PER_ITERATION,
        batch_size=int(SETTINGS["minibatch"]), update_step_num_repetitions=int(SETTINGS["epochs"]),
        verbose=False, show_progress=False,
    )  # fmt: skip
    start_together()
    started = time.process_time()
    algorithm.run_training(sizes)
    seconds = time.process_time() - started
    return {
        "steps_per_second": iterations * PER_ITERATION / seconds,
        "return": score(policy, made, env, seed + 1000),
    }


def body(space: Any) -> Net:
    """Two hidden layers of 64."""
    return Net(state_shape=space.shape, hidden_sizes=[64, 64], activation=nn.Tanh)


def orthogonal(network: Any, gain: float) -> Any:
    """Its weights so, those of the last layer with another gain."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return network


def actor_policy(made: Any) -> Any:
    """It takes its mode outside of training."""
    space, preprocess = made.action_space, body(made.observation_space)
    spaces = {"action_space": space, "observation_space": made.observation_space, "deterministic_eval": True}
    if isinstance(space, gym.spaces.Discrete):
        discrete = DiscreteActor(preprocess_net=preprocess, action_shape=int(space.n), softmax_output=False)
        return DiscreteActorPolicy(actor=orthogonal(discrete, 0.01), **spaces)
    actor = ContinuousActorProbabilistic(preprocess_net=preprocess, action_shape=space.shape, unbounded=True)
    return ProbabilisticActorPolicy(
        actor=orthogonal(actor, 0.01), dist_fn=gaussian, action_scaling=False, action_bound_method="clip", **spaces
    )  # fmt: skip


def gaussian(outputs: Any) -> torch.distributions.Independent:
    """Of mean and deviation; arguments are not checked."""
    return torch.distributions.Independent(torch.distributions.Normal(*outputs, validate_args=False), 1)


@torch.no_grad()
def score(policy: Any, trained: Any, env: str, seed: int) -> float:
    """Mean return of episodes by the mode, with the moments of training."""
    normalized = trained.get_obs_rms().norm if TASKS[env] else np.asarray
    return mean_return(lambda observation: policy.compute_action(normalized(observation)), env, seed)


if __name__ == "__main__":
    run(train)
