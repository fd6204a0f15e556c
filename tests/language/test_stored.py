"""Training on stored completions: they are what is learned, with the scores that came with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import polopt
from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.errors import ConfigError


def data(tmp_path: Path, rows: int = 12, **change: Any) -> str:
    """Every prompt has a good and a bad completion."""
    file = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"say {i}: ", "answer": "yes", "completions": ["yes", "no!"], "scores": [1.0, -1.0]}
        | change
        for i in range(rows)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return f"jsonl:{file}"


def trainer(spec: str, method: str = "copg", **sizes: Any) -> Any:
    language = {"model": "tiny:1x32", "stored": True, "max_new_tokens": 6, "chat_template": False}
    sizes = {"iterations": 25, "prompts": 4, "rollouts": 2, "lr": 1e-2, "score_prompts": 1, **sizes}
    options = {"verifier": "exact", "style": "plain", "heldout_fraction": 0.2}
    config = RunConfig.create(
        "", method=method, task=spec, task_options=options, trainer=sizes, language=language
    )
    return build(config)


def test_the_better_of_two_stored_completions_becomes_likelier(tmp_path: Path) -> None:
    run = trainer(data(tmp_path))
    batch = run._collect(run._draw).batch
    assert sorted(set(batch.rewards[:, 0].tolist())) == [-1.0, 1.0]
    assert batch.lengths.tolist() == [4] * len(batch) or (batch.lengths <= 4).all()

    def preference() -> float:
        with torch.no_grad():
            logp = run.actor.evaluate(batch, frozenset({"logp"})).logp.sum(-1)
        return float((logp * batch.rewards[:, 0]).mean())

    before = preference()
    for _ in range(25):
        run.iterate()
    close(run)
    assert preference() > before + 1.0


def test_a_loss_with_a_ratio_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"language\.stored = true: surrogate"):
        trainer(data(tmp_path), method="grpo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["yes"]}, "1 stored completions, and 2 are asked for"),
        ({"completions": "yes"}, "no list in the column 'completions'"),
        ({"scores": [1.0, float("nan")]}, "scores that are not finite"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = trainer(data(tmp_path, **change))
    with pytest.raises(ConfigError, match=message):
        run.iterate()
    close(run)


def test_the_trainer_refuses_it_too(tmp_path: Path) -> None:
    run = trainer(data(tmp_path))
    with pytest.raises(ConfigError, match="reads the policy that made the completions"):
        polopt.Trainer(run.actor, run.task, polopt.recipe("grpo"))
    close(run)
