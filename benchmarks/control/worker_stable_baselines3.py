"""Stable-Baselines3's side."""

import time
from typing import Any

from settings import (
    ENVIRONMENTS,
    EPISODES,
    MAX_GRAD_NORM,
    PER_ITERATION,
    SETTINGS,
    STEPS,
    TASKS,
    VALUE_COEF,
    run,
    start_together,
)  # fmt: skip
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize


def train(env: str, seed: int, iterations: int) -> dict[str, float]:
    """Train and score."""
    made: Any = make_vec_env(env, ENVIRONMENTS, seed=seed)
    if TASKS[env]:
        made = VecNormalize(made, gamma=SETTINGS["gamma"])
    model = PPO(
        "MlpPolicy", made, learning_rate=SETTINGS["lr"], n_steps=STEPS, batch_size=SETTINGS["minibatch"],
        n_epochs=SETTINGS["epochs"], gamma=SETTINGS["gamma"], gae_lambda=SETTINGS["gae_lambda"],
        clip_range=SETTINGS["clip"], max_grad_norm=MAX_GRAD_NORM, vf_coef=VALUE_COEF, ent_coef=0.0, seed=seed,
        device="cpu",
    )  # fmt: skip
    start_together()
    started = time.process_time()
    model.learn(iterations * PER_ITERATION)
    seconds = time.process_time() - started
    scored: Any = make_vec_env(env, 1, seed=seed + 1000)
    if TASKS[env]:
        scored = VecNormalize(scored, training=False, norm_reward=False)
        scored.obs_rms = made.obs_rms
    mean, _ = evaluate_policy(model, scored, EPISODES, warn=False)
    return {"steps_per_second": iterations * PER_ITERATION / seconds, "return": float(mean)}


if __name__ == "__main__":
    run(train)
