"""PPO on sampled episodes of the ring, from the reference policy: a discriminator's penalty against action baselines."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from exact import GAMMA, Tables, ring
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import one_hot

import polopt
from polopt.batch import Batch, Evaluation
from polopt.domain import Plan, Rollout
from polopt.method import Method
from polopt.methods.classics.ppo import GAE, PPOClip, ValueLoss
from polopt.methods.preference.orpo_chi2 import ActionDivergence, ActionSqrtChi2
from polopt.methods.preference.orpo_occupancy import OccupancyPenalty
from polopt.parts import Draw, Regularizer, Shaping

EPISODES, HORIZON, ITERATIONS, LAST = 24, 100, 60, 10


class RingTask:
    """Episodes of the ring; every one starts in state 0."""

    name, reward_names, train_size, heldout_size = "ring", (), EPISODES, EPISODES

    def state_dict(self) -> dict[str, Any]:
        """Nothing lives on between iterations."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing is held."""


class TabularActor:
    """A table of logits and one of values, from the reference policy."""

    domain, exact_sampler, own_rollouts, independent_decisions = "control", True, True, True
    provides = frozenset(
        {"logp", "value", "old_value", "ref_logp", "last_value", "step_rewards", "terminated"}
    )

    def __init__(self, tables: Tables) -> None:
        self.transitions, self.proxy = tables.transitions[0].cumsum(-1), tables.proxy[0]
        logits = tables.policy[0].log()
        self.module = nn.ParameterDict(
            {
                "policy": nn.Parameter(logits),
                "critic": nn.Parameter(torch.zeros(len(logits), dtype=logits.dtype)),
            }
        )
        self._initial = deepcopy(self.module)
        self._current = self.module

    def policy(self) -> Tensor:
        """The current table of probabilities [S, A]."""
        return self.module["policy"].detach().softmax(-1)

    @torch.no_grad()
    def rollout(self, task: RingTask, plan: Plan, generator: torch.Generator) -> Rollout:
        """Whole episodes, cut at the horizon."""
        count = int(plan.counts.sum())
        uniforms = torch.rand(HORIZON, 2, count, generator=generator, dtype=torch.float64)
        states, actions = torch.zeros(2, count, HORIZON + 1, dtype=torch.int64)
        chances = self.policy().cumsum(-1)
        for step in range(HORIZON):
            here = states[:, step]
            action = (chances[here] < uniforms[step, 0, :, None]).sum(-1).clamp(max=chances.shape[1] - 1)
            actions[:, step] = action
            there = (self.transitions[here, action] <= uniforms[step, 1, :, None]).sum(-1)
            states[:, step + 1] = there.clamp(max=len(chances) - 1)
        seen, taken = states[:, :-1], actions[:, :-1]
        batch = Batch(
            mask=torch.ones(count, HORIZON, dtype=torch.bool),
            old_logp=torch.zeros(count, HORIZON, dtype=torch.float64),
            rewards=torch.zeros(count, 0, dtype=torch.float64),
            step_rewards=self.proxy[seen, taken],
            group=torch.arange(count),
            prompt_id=plan.prompt_ids.repeat_interleave(plan.counts),
            terminated=torch.zeros(count, dtype=torch.bool),
            last_value=self.module["critic"][states[:, -1]],
            payload=TensorDict({"state": seen, "action": taken}, batch_size=[count]),
            batch_size=[count],
        )
        batch.set_evaluated("old", self.evaluate(batch, frozenset({"value"})))
        return Rollout(batch)

    def evaluate(self, batch: Batch, requires: frozenset[str], **options: Any) -> Evaluation:
        """The current tables' view of the decisions."""
        table: Any = self._current
        state, action = batch.payload["state"], batch.payload["action"]
        logp = table["policy"].log_softmax(-1)[state, action]
        return Evaluation(logp, value=table["critic"][state]) if "value" in requires else Evaluation(logp)

    def micro_batches(self, batch: Batch) -> list[Tensor]:
        """All rows at once."""
        return [torch.arange(len(batch))]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The initial tables."""
        self._current = self._initial
        try:
            yield
        finally:
            self._current = self.module

    def observe(self, batch: Batch) -> dict[str, float]:
        """Nothing is normalised."""
        return {}

    def score(self, task: RingTask, batch: Batch) -> dict[str, float]:
        """Not used: the true return is computed from the table."""
        return {}


class StateAction(Shaping):
    """One-hot state and action, for the discriminator."""

    name = "state_action"
    provides = frozenset({"state_action"})

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        batch = batch.clone(recurse=False)
        index = 3 * batch.payload["state"] + batch.payload["action"]
        batch.set_signal("state_action", one_hot(index, 18).double())
        return batch

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        return {"state_action": batch.signal("state_action")}


def method(kind: str, coef: float) -> Method:
    """PPO with one of the penalties."""
    shaping: list[Shaping] = []
    penalties: list[Regularizer] = [ValueLoss(coef=0.5)]
    if kind.startswith("occupancy"):
        discriminator = {"features": "state_action", "layers": 0, "epochs": 4, "minibatch": 300, "lr": 0.02}
        part = OccupancyPenalty(
            kind=kind.removeprefix("occupancy_"),
            coef=coef,
            scale_free=False,
            reward_clip=100.0,
            **discriminator,
        )
        shaping = [StateAction(), part]
    elif kind == "action_kl":
        penalties.append(ActionDivergence(kind="kl", coef=coef, gamma=GAMMA))
    elif kind == "action_sqrt_chi2":
        penalties.append(ActionSqrtChi2(coef=coef, gamma=GAMMA))
    return Method(
        shaping=shaping,
        advantage=GAE(gamma=GAMMA, gae_lambda=0.95, whiten=False),
        surrogate=PPOClip(),
        regularizers=penalties,
        defaults={"epochs": 4, "minibatches": 4},
    )


def train(kind: str, coef: float, seed: int, iterations: int = ITERATIONS) -> float:
    """Mean true return over the last ten iterations, exact for each policy."""
    tables = ring()
    actor = TabularActor(tables)
    config = polopt.TrainerConfig(
        prompts=EPISODES, rollouts=1, lr=0.05, max_grad_norm=10.0, seed=seed, iterations=iterations
    )
    trainer = polopt.Trainer(actor, RingTask(), method(kind, coef), config)
    returns = []
    for number in range(iterations):
        trainer.iterate()
        if number >= iterations - LAST:
            returns.append(float(tables.true_return(actor.policy()[None])))
    return sum(returns) / len(returns)
