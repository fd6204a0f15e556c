"""Every recipe trains a language model from scratch: what it requires of the actor is there."""

import pytest
import torch

import polopt
from polopt.language.actor import LanguageActor
from polopt.language.config import LanguageConfig
from polopt.language.tasks import task_from_spec
from polopt.registry import recipe_domains


@pytest.fixture(scope="module")
def task():
    with task_from_spec("builtin:largest", count=2, digits=1, shots=1, heldout_size=4) as made:
        made.train_size = 6
        yield made


@pytest.mark.parametrize("recipe", [name for name in polopt.recipes() if recipe_domains(name) is None])
def test_recipe_trains_a_language_model(recipe: str, task) -> None:
    slots = (
        {"optimizer": "snr:lr_min_share=0.1"} if recipe == "oblr_po" else {}
    )  # random rewards are all noise
    method = polopt.recipe(recipe, **slots)
    config = LanguageConfig(model="tiny:1x32", max_new_tokens=4, micro_batch_tokens=64)
    actor = LanguageActor.build(config, stop=task.stop, critic="old_value" in method.requires)
    sizes = polopt.TrainerConfig(iterations=2, prompts=3, rollouts=4, lr=1e-2)
    trainer = polopt.Trainer(actor, task, method, sizes)
    draws = torch.Generator().manual_seed(0)
    score = task.score
    task.score = lambda texts, examples: _random(score(texts, examples), draws)
    before = [p.detach().clone() for p in actor.module.parameters()]
    try:
        steps = [trainer.iterate()[0] for _ in range(2)]
    finally:
        task.score = score
    assert all(p.isfinite().all() for p in actor.module.parameters())
    assert sum(step["updates"] for step in steps) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, actor.module.parameters(), strict=True))


def _random(scores, draws: torch.Generator):
    """Rewards of 0 and 1 at random, so that untrained completions have something to tell apart."""
    scores.rewards[:] = torch.rand(scores.rewards.shape, generator=draws, dtype=torch.float64).round()
    return scores
