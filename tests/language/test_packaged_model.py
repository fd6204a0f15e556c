"""Every recipe for language runs from the command line on the packaged model, SmolLM2 with 135 million parameters."""

import json
import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import polopt
from polopt.cli import main
from polopt.engine.checkpoint import checkpoints, load
from polopt.engine.run_folder import RunFolder, read_metrics
from polopt.language.model import SMOLLM2_PACKAGE
from polopt.language.task import LanguageTask
from polopt.registry import recipe_domains

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(SMOLLM2_PACKAGE) is None, reason="the package of the weights is not installed"
    ),
]
SMALL = [
    *("--task", "builtin:largest", "--prompts", "2", "--rollouts", "4", "--iterations", "2", "--lr", "1e-4"),
    *("--max-new-tokens", "6", "--score-prompts", "2", "--checkpoint-every", "100", "--epochs", "1", "--quiet"),
]  # fmt: skip
# a score vector of all weights for each completion takes gigabytes, and is refused
ADAPTER = ["--lora-rank", "1"]
OWN: dict[str, list[str]] = {
    "bac": ADAPTER,
    "bpg": ADAPTER,
    "bpg-natural": ADAPTER,
    "mmr1_vas": ["--sampler", "vas:pool=4,scoring_rollouts=2"],
    "oblr_po": ["--optimizer", "snr:lr_min_share=0.1"],  # random rewards are all noise
}


@pytest.fixture(autouse=True)
def alternating_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of 0 and 1 in turn, so that every prompt's completions have something to tell apart."""
    measured = LanguageTask.score

    def score(self, completions, examples):
        scores = measured(self, completions, examples)
        scores.rewards[:, 0] = torch.arange(len(completions)) % 2
        return scores

    monkeypatch.setattr(LanguageTask, "score", score)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A run folder, whose gigabytes do not stay."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("recipe", [name for name in polopt.recipes() if recipe_domains(name) is None])
def test_recipe_trains_the_packaged_model(recipe: str, out: Path) -> None:
    assert main(["train", "--method", recipe, *SMALL, *OWN.get(recipe, []), "--out", str(out)]) == 0
    metrics = read_metrics(out)
    assert [line["iteration"] for line in metrics] == [1, 2]
    assert sum(line.get("updates", 0) for line in metrics) > 0
    assert all(math.isfinite(line["loss"]) for line in metrics if "loss" in line)
    assert RunFolder(out).read_config()["method"] == recipe
    assert not json.loads((out / "summary.json").read_text())["interrupted"]
    before, after = (load(path)["model"] for path in sorted(checkpoints(out / "checkpoints")))
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
