"""PPO as one plain loop over Gymnasium and torch, nothing but what the algorithm needs (arXiv 1707.06347).

Its time is a bound for what a library can do with the same tensors: no checkpoints, metrics, masks or options. The end of
an episode by a time limit counts as an end, and the step of a reset is trained on like any other.
"""

import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import vector
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
)
from torch import Tensor, nn

GAMMA, LAMBDA, CLIP = SETTINGS["gamma"], SETTINGS["gae_lambda"], SETTINGS["clip"]


class Agent(nn.Module):
    """Policy and critic."""

    def __init__(self, inputs: int, space: Any) -> None:
        super().__init__()
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.actor = network(inputs, int(space.n) if self.discrete else space.shape[0], 0.01)
        self.critic = network(inputs, 1, 1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(space.shape[0]))

    def distribution(self, seen: Tensor) -> Any:
        """Of the actions; arguments are not checked."""
        outputs = self.actor(seen)
        if self.log_std is None:
            return torch.distributions.Categorical(logits=outputs, validate_args=False)
        return torch.distributions.Normal(outputs, self.log_std.exp(), validate_args=False)

    def logp(self, distribution: Any, action: Tensor) -> Tensor:
        """Log-probability of actions."""
        found = distribution.log_prob(action)
        return found if self.discrete else found.sum(-1)


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(*layers)


def environments(env: str, count: int, normalized: bool) -> Any:
    """They reset themselves in the step after an episode's end."""
    made: Any = gym.make_vec(env, count, "sync")
    if normalized:
        made = vector.TransformReward(vector.NormalizeReward(made, GAMMA), lambda r: np.clip(r, -10, 10))
        made = vector.TransformObservation(vector.NormalizeObservation(made), lambda o: np.clip(o, -10, 10))
    return made


def clipped(action: Tensor, space: Any) -> Any:
    """As the environment takes it."""
    return (
        action.numpy()
        if isinstance(space, gym.spaces.Discrete)
        else action.numpy().clip(space.low, space.high)
    )


@torch.no_grad()
def rollout(agent: Agent, made: Any, observation: Any) -> tuple[list[Tensor], Any]:
    """Observations, actions, log-probabilities, advantages and returns of an iteration, flattened."""
    space, columns = made.single_action_space, [[] for _ in range(6)]
    for _ in range(STEPS):
        seen = torch.as_tensor(observation, dtype=torch.float32)
        distribution = agent.distribution(seen)
        action = distribution.sample()
        observation, reward, terminated, truncated, _ = made.step(clipped(action, space))
        row = seen, action, agent.logp(distribution, action), agent.critic(seen)[:, 0]
        ended = torch.as_tensor(terminated | truncated, dtype=torch.float32)
        for column, value in zip(
            columns, (*row, torch.as_tensor(reward, dtype=torch.float32), ended), strict=True
        ):
            column.append(value)
    seen, action, logp, value, reward, ended = map(torch.stack, columns)
    following = agent.critic(torch.as_tensor(observation, dtype=torch.float32))[:, 0]
    advantages, last = torch.zeros_like(value), torch.zeros(ENVIRONMENTS)
    for t in reversed(range(STEPS)):
        error = reward[t] + GAMMA * following * (1 - ended[t]) - value[t]
        advantages[t] = last = error + GAMMA * LAMBDA * (1 - ended[t]) * last
        following = value[t]
    found = [seen, action, logp, advantages, advantages + value]
    return [tensor.flatten(0, 1) for tensor in found], observation


def update(agent: Agent, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    """All passes over an iteration's data."""
    for _ in range(int(SETTINGS["epochs"])):
        for rows in torch.randperm(PER_ITERATION).split(int(SETTINGS["minibatch"])):
            seen, action, old, advantages, returns = (tensor[rows] for tensor in data)
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            ratio = (agent.logp(agent.distribution(seen), action) - old).exp()
            policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            loss = policy + VALUE_COEF * (agent.critic(seen)[:, 0] - returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
            optimizer.step()


def train(env: str, seed: int, iterations: int) -> dict[str, float]:
    """Train and score."""
    torch.manual_seed(seed)
    made = environments(env, ENVIRONMENTS, TASKS[env])
    agent = Agent(made.single_observation_space.shape[0], made.single_action_space)
    optimizer = torch.optim.Adam(agent.parameters(), SETTINGS["lr"], eps=1e-5, fused=True)
    observation, _ = made.reset(seed=seed)
    start_together()
    started = time.process_time()
    for _ in range(iterations):
        data, observation = rollout(agent, made, observation)
        update(agent, optimizer, data)
    seconds = time.process_time() - started
    return {
        "steps_per_second": iterations * PER_ITERATION / seconds,
        "return": score(agent, made, env, seed + 1000),
    }


@torch.no_grad()
def score(agent: Agent, trained: Any, env: str, seed: int) -> float:
    """Mean return of episodes by the mode, with the moments of training."""
    space, moments = trained.single_action_space, trained.env.obs_rms if TASKS[env] else None

    def act(observation: Any) -> Any:
        if moments is not None:
            observation = ((observation - moments.mean) / (moments.var + 1e-8) ** 0.5).clip(-10, 10)
        outputs = agent.actor(torch.as_tensor(observation, dtype=torch.float32))
        return clipped(outputs.argmax() if agent.discrete else outputs, space)

    return mean_return(act, env, seed)


if __name__ == "__main__":
    run(train)
