"""A language model, whole on every rank and sharded over them."""

from typing import Any

import torch
from tensordict import TensorDict

from polopt.batch import Batch
from polopt.engine.gradient import backward
from polopt.engine.ranks import Ranks
from polopt.language.actor import LanguageActor
from polopt.language.completions import SamplingConfig
from polopt.language.config import LanguageConfig
from tests.engine.test_gradient import OBJECTIVES, assert_same
from tests.engine.two_ranks.sharded import whole_gradients

ALONE = Ranks()


def make_batch() -> Batch:
    """Completions of three prompts of different lengths."""
    g = torch.Generator().manual_seed(2)
    group = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    prompt_length = torch.tensor([5, 2, 7])[group]
    rows, length = len(group), 6
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=g)
    prompts = torch.randint(3, 90, (3, 7), generator=g)[group]
    payload = {
        "prompt": torch.where(torch.arange(7) < prompt_length[:, None], prompts, 0),
        "prompt_length": prompt_length,
        "tokens": torch.where(mask, torch.randint(3, 90, (rows, length), generator=g), 0),
    }
    noise = torch.rand(rows, length, generator=g, dtype=torch.float64)
    return Batch(
        mask=mask,
        old_logp=-5 - noise,
        rewards=noise[:, :1],
        group=group,
        prompt_id=group,
        advantages=noise - 0.5,
        loss_weight=torch.where(mask, noise, 0.0),
        payload=TensorDict(payload, [rows]),
        batch_size=[rows],
    )


def make_actor() -> Any:
    sizes: dict[str, Any] = {"model": "tiny:2x32:char", "dtype": "float64", "micro_batch_tokens": 25}
    return LanguageActor.build(LanguageConfig(**sizes), seed=3)


def check_gradients_and_completions_are_those_of_one_process(ranks: Ranks) -> None:
    batch, alone = make_batch(), make_actor()
    prompts, count = [[4, 5, 6], [7, 8]], 2 + 3 * ranks.rank
    config = SamplingConfig(max_new_tokens=3 + ranks.rank, temperature=0.0)
    uniforms = torch.rand(count, config.max_new_tokens, dtype=torch.float64)
    for sharding in ("none", "fsdp2"):
        shared, actor = Ranks(ranks.rank, ranks.world, sharding), make_actor()
        shared.shard(actor.module)
        for name, path in [
            ("gspo_like", "fused"),
            ("pairwise", "two passes"),
            ("classification", "two passes"),
        ]:
            objective, requires, _ = OBJECTIVES[name]
            for some, own in ((actor, shared), (alone, ALONE)):
                some.module.zero_grad()
                backward(some, batch, objective, requires, separable=path == "fused", ranks=own)
            found, expected = whole_gradients(actor.module), whole_gradients(alone.module)
            assert len(found) == 20
            assert_same(found, expected, 1e-6)  # transformers normalises in float32, whatever the weights are
        with shared.full_parameters():
            actor.sampler.refresh()
            drawn = actor.sampler.sample(prompts, [1, count - 1], config, uniforms)
        alone.sampler.refresh()
        right = alone.sampler.sample(prompts, [1, count - 1], config, uniforms)
        assert torch.equal(drawn.tokens, right.tokens)
