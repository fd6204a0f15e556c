"""A run that is killed at any moment and resumed equals one that never was, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polopt.engine import checkpoint
from polopt.engine.run_folder import read_metrics

RUN = """
import sys
import polopt
from polopt.miniature import SumModActor, SumModTask

task = SumModTask()
config = polopt.TrainerConfig(iterations=30, prompts=6, rollouts=4, lr=0.01, checkpoint_every=2, score_every=7, replay=2)
method = polopt.recipe("ppo", surrogate="r2vpo", budget="knapsack")
trainer = polopt.Trainer(SumModActor(task), task, method, config, out=sys.argv[1])
print("ready", flush=True)
trainer.run(resume=len(sys.argv) > 2)
"""


def start(out: Path, resume: bool = False) -> subprocess.Popen[str]:
    """A process that runs to the end, once it has imported everything."""
    arguments = [sys.executable, "-c", RUN, str(out), *(["resume"] if resume else [])]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "ready\n"
    return process


def outcome(out: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Logged metrics but for the clock's, and the digests of the last checkpoint's files."""
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
        for line in read_metrics(out)
    ]
    newest = max((out / "checkpoints").iterdir())
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return lines, {name: entry["sha256"] for name, entry in files.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, str]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert start(out).wait() == 0
    return outcome(out)


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed_run_is_bit_identical(
    seed: int, whole: tuple[list[dict[str, Any]], dict[str, str]], tmp_path: Path
) -> None:
    draw, out = random.Random(seed), tmp_path / "run"
    process, kills = start(out), 0
    while process.poll() is None and kills < 2:
        seen = len(read_metrics(out)) if out.exists() else 0
        wanted = seen + draw.randint(1, 8)
        while process.poll() is None and (not out.exists() or len(read_metrics(out)) < wanted):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
        process = start(out, resume=bool(checkpoint.checkpoints(out / "checkpoints")))
    assert process.wait() == 0
    assert kills > 0
    assert outcome(out) == whole
