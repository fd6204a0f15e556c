"""`polopt compare`: equal budgets and prompts, tuning on other seeds, resuming, refusing."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polopt.cli import jobs, main
from polopt.cli.compare import _tuned
from polopt.cli.comparison import TUNING_SEED
from polopt.cli.domains import DOMAINS
from polopt.cli.jobs import is_finished, make_run, run_all
from polopt.config import configure
from polopt.engine.run_folder import read_metrics

pytest.importorskip("matplotlib")

SMALL = [
    *("--domain", "miniature", "--task-option", "length=1", "--prompts", "4", "--rollouts", "4", "--iterations", "3"),
    *("--score-prompts", "16", "--jobs", "1"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two methods and two seeds, with a tuned learning rate."""
    out = tmp_path_factory.mktemp("whole") / "out"
    chosen = ["--methods", "grpo,mmr1_vas", "--seeds", "2", "--lrs", "0.01,0.1", "--tuning-seeds", "1"]
    assert main(["compare", *SMALL, *chosen, "--out", str(out)]) == 0
    return out


def runs(out: Path) -> list[Path]:
    return sorted(path.parent for path in (out / "runs").rglob("config.json"))


def config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["compare", *argv]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_comparison_writes_table_figures_and_data(whole: Path) -> None:
    written = {path.name for path in whole.iterdir()}
    assert written == {
        "compare.toml", "results.json", "results.csv", "table.md", "curves.png", "curves.csv", "runs"
    }  # fmt: skip
    found = json.loads((whole / "results.json").read_text())
    assert {row["method"] for row in found["summary"]} == {"grpo", "mmr1_vas"} and not found["failures"]
    assert all(set(tuned["area"]) == {"0.01", "0.1"} for tuned in found["tuning"])
    with open(whole / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == 4
    text = (whole / "table.md").read_text()
    assert "| grpo |" in text and "| mmr1_vas |" in text and "area - grpo" in text


def test_learning_rate_is_the_best_of_the_tuning_seeds_which_are_not_reported(whole: Path) -> None:
    found = json.loads((whole / "results.json").read_text())
    for tuned in found["tuning"]:
        best = max(tuned["area"], key=tuned["area"].get)
        mine = [run for run in found["runs"] if run["method"] == tuned["method"]]
        assert {run["seed"] for run in mine} == {0, 1} and {run["lr"] for run in mine} == {float(best)}
    seeds = {config(run)["trainer"]["seed"] for run in runs(whole)}
    assert seeds == {0, 1, TUNING_SEED}


def test_runs_differ_in_method_rate_and_seed_alone(whole: Path) -> None:
    configs = [config(run) for run in runs(whole)]
    assert len(configs) == 2 * 2 + 4
    for found in configs:
        for name in ("out", "method"):
            found.pop(name)
        for name in ("lr", "seed", "epochs", "minibatches"):
            found["trainer"].pop(name)
    assert all(found == configs[0] for found in configs)


def test_methods_see_the_same_prompts_and_initial_weights(tmp_path: Path) -> None:
    first = {}
    for method in ("grpo", "rloo", "dr_grpo"):
        assert make_run(job(tmp_path / method, method, 3 * 16))["status"] == "done"
        lines = [json.loads(line) for line in (tmp_path / method / "samples.jsonl").read_text().splitlines()]
        prompts = [(line["iteration"], line["prompt"]) for line in lines]
        before = json.loads((tmp_path / method / "summary.json").read_text())["before"]["score"]
        first[method] = (prompts, before, lines[0]["completion"])
    assert first["grpo"] == first["rloo"] == first["dr_grpo"]


def job(out: Path, method: str, budget: int, unit: str = "rollouts", **trainer: Any) -> jobs.Job:
    sizes = {"iterations": 3, "prompts": 4, "rollouts": 4, "score_prompts": 16, "score_every": 1}
    run = configure({"domain": "miniature", "method": method, "out": out, "trainer": {**sizes, **trainer}})
    return {"config": run.model_dump(mode="json"), "unit": unit, "budget": budget}


def test_rollouts_that_only_score_prompts_are_charged(tmp_path: Path) -> None:
    assert make_run(job(tmp_path / "vas", "mmr1_vas", 160, iterations=10)) == {"status": "done"}
    lines = read_metrics(tmp_path / "vas")
    used = [line["rollouts"] for line in lines]
    assert max(used) > 16 and len(lines) < 10
    assert sum(used) >= 160 > sum(used[:-1])
    assert is_finished(tmp_path / "vas")


@pytest.mark.parametrize("unit", ["rollouts", "tokens"])
def test_run_ends_when_its_budget_is_used_up(unit: str, tmp_path: Path) -> None:
    assert make_run(job(tmp_path / "run", "grpo", 50, unit, iterations=9)) == {"status": "done"}
    used = [line[unit] for line in read_metrics(tmp_path / "run")]
    assert sum(used) >= 50 > sum(used[:-1])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["iteration"] == len(used) < 9 and "score" in summary["after"]
    newest = max((tmp_path / "run" / "checkpoints").iterdir()).name
    assert newest == f"iteration-{len(used):06d}"


def test_control_methods_get_as_many_steps_with_sizes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    argv = ["compare", "--domain", "control", "--task", "polopt/Chain-v0", "--methods", "ppo,reinforce"]
    argv += ["--horizon", "0", "--budget", "3000", "--score-every", "2", "--score-prompts", "4"]
    argv += ["--seeds", "2", "--lrs", "0.001", "--jobs", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["unit"] == "steps" and found["thresholds"] == {"polopt/Chain-v0": None}
    assert {row["method"] for row in found["summary"]} == {"ppo", "reinforce"} and not found["failures"]
    sizes = {}
    for run in runs(tmp_path):
        used = [line["steps"] for line in read_metrics(run)]
        assert sum(used) >= 3000 > sum(used[:-1])
        assert used == [line["decisions"] for line in read_metrics(run)]
        trainer = config(run)["trainer"]
        sizes[config(run)["method"]] = trainer["prompts"] * trainer["rollouts"]
    assert sizes == {"ppo": 8, "reinforce": 128}


def test_steps_of_environments_that_live_on_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    argv = [
        "compare",
        "--domain",
        "control",
        "--task",
        "CartPole-v1",
        "--methods",
        "ppo,bpo,mdpo",
        "--dry-run",
    ]
    assert main(argv) == 0
    assert "15 reported ones of 102400 steps" in capsys.readouterr().out  # 50 iterations of 8 x 256
    assert main([*argv, "--horizon", "32", "--iterations", "3"]) == 0
    assert "reported ones of 768 steps" in capsys.readouterr().out


def test_environments_say_when_they_count_as_solved() -> None:
    pytest.importorskip("gymnasium")
    thresholds = {name: DOMAINS["control"].threshold(name) for name in ("CartPole-v1", "Pendulum-v1")}
    assert thresholds == {"CartPole-v1": 475.0, "Pendulum-v1": math.inf}
    assert DOMAINS["miniature"].threshold("miniature:rare") == 0.8


def test_learning_rate_with_a_failed_run_comes_last_even_where_scores_are_negative(tmp_path: Path) -> None:
    def folder(task: str, method: str, lr: float, seed: int) -> Path:
        return tmp_path / f"{lr}-{seed}"

    for lr, seed, score in ((0.1, 0, -50.0), (0.1, 1, -70.0), (0.3, 0, -10.0)):
        folder("", "", lr, seed).mkdir()
        summary = {"interrupted": False, "before": {"score": score}, "after": {"score": score}}
        (folder("", "", lr, seed) / "summary.json").write_text(json.dumps(summary))
        (folder("", "", lr, seed) / "metrics.jsonl").write_text('{"iteration": 1, "steps": 9}\n')
    comparison: Any = SimpleNamespace(
        tuning_seeds=[0, 1], lrs=[0.1, 0.3], folder=folder, unit="steps", budget=9
    )
    assert _tuned(comparison, ("task", "method")) == {0.1: -60.0, 0.3: -math.inf}


def test_finished_runs_are_not_made_again_and_missing_ones_are(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    lost = next(run for run in runs(out) if run.name == "seed-1")
    shutil.rmtree(lost)
    half = next(run for run in runs(out) if run.name == "seed-0")
    (half / "summary.json").unlink()
    stamps = {run: (run / "config.json").stat().st_mtime_ns for run in runs(out)}
    before = {name: (out / name).read_text() for name in ("curves.csv",)}
    assert main(["compare", str(out / "compare.toml"), "--out", str(out), "--jobs", "1"]) == 0
    assert "reported: 2 of 2 runs" in capsys.readouterr().out
    changed = [run for run, stamp in stamps.items() if (run / "config.json").stat().st_mtime_ns != stamp]
    assert changed == [half] and is_finished(lost)
    assert {name: (out / name).read_text() for name in before} == before


def test_interrupted_run_goes_on_from_its_checkpoint_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_run(job(tmp_path / "whole", "grpo", 96, iterations=6, checkpoint_every=2))["status"] == "done"
    first = job(tmp_path / "parts", "grpo", 96, iterations=6, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_Meter", interrupting(after=3))
        with pytest.raises(KeyboardInterrupt):
            make_run(first)
    assert not is_finished(tmp_path / "parts")
    assert make_run(first)["status"] == "done"
    whole, parts = (
        [(line["iteration"], line["reward"], line.get("score")) for line in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert whole == parts


def interrupting(after: int) -> type:
    class Meter(jobs._Meter):
        def log(self, iteration: int, metrics: dict[str, float]) -> None:
            super().log(iteration, metrics)
            if iteration == after:
                raise KeyboardInterrupt

    return Meter


def test_failed_and_killed_runs_are_reported_and_the_others_made(tmp_path: Path) -> None:
    deadly = tmp_path / "deadly.py"
    deadly.write_text("import os\n\nos._exit(7)\n")
    jobs = {name: job(tmp_path / name, "grpo", 48) for name in ("bad", "killed", "good")}
    jobs["bad"]["config"]["miniature"]["width"] = 0
    jobs["killed"]["config"]["plugins"] = [str(deadly)]
    outcomes = {Path(job["config"]["out"]).name: outcome for job, outcome in run_all(list(jobs.values()), 1)}
    assert outcomes["good"] == {"status": "done"}
    assert outcomes["bad"]["status"] == outcomes["killed"]["status"] == "failed"
    assert "width" in outcomes["bad"]["error"] and "code 7" in outcomes["killed"]["error"]


@pytest.mark.slow
def test_interrupted_comparison_says_so_and_the_same_command_goes_on(tmp_path: Path) -> None:
    argv = [
        *SMALL,
        "--methods",
        "grpo",
        "--lrs",
        "0.1",
        "--seeds",
        "3",
        "--iterations",
        "2000",
        "--out",
        "out",
    ]
    command = [
        sys.executable,
        "-m",
        "polopt",
        "compare",
        *argv,
        "--checkpoint-every",
        "10",
        "--score-every",
        "500",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not list(Path("out").rglob("iteration-000010")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in output
    (run,) = runs(Path("out"))
    done = len(read_metrics(run))
    assert 10 <= done < 2000 and json.loads((run / "summary.json").read_text())["interrupted"]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--methods", "grpo,gprpo"], ["gprpo", "did you mean 'grpo'"]),
        (["--methods", "grpo,grpo"], ["methods", "grpo", "twice"]),
        (["--methods", "bpo"], ["bpo", "miniature"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["--lrs", "0.1,abc"], ["--lrs", "abc"]),
        (["--lrs", "0.1,-1"], ["lrs", "-1"]),
        (["--budget-unit", "steps"], ["--budget-unit", "steps", "rollouts"]),
        (["--budget-unit", "steps"], ["--budget-unit", "steps", "rollouts or tokens"]),
        (["--budget-unit", "tokens", "--score-every", "1"], ["budget", "tokens"]),
        (["--budget-unit", "tokens", "--budget", "100"], ["score_every"]),
        (["--domain", "control", "--budget-unit", "rollouts"], ["--budget-unit", "rollouts", "steps"]),
        (["--domain", "control", "--methods", "grpo"], ["score_every", "grpo", "steps"]),
        (["--domain", "control", "--methods", "grpo", "--score-every", "1"], ["budget", "grpo", "steps"]),
        (["--domain", "control", "--methods", "gbpo", "--task", "Nowhere-v0"], ["Nowhere"]),
        (["--tasks", "miniature:rar"], ["miniature:rar", "miniature:rare"]),
        (["--task-option", "lenth=3"], ["lenth", "length"]),
        (["--jobs", "0"], ["--jobs", "0"]),
        (["--method", "grpo"], ["--method", "--methods"]),
        (["--iterations", "0"], ["iterations"]),
        (["absent.toml"], ["absent.toml"]),
    ],
)
def test_bad_comparisons_are_refused_in_one_line(
    argv: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["--domain", "miniature", *argv], capsys)
    assert all(name in message for name in names), message


def test_folder_of_another_comparison_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--methods", "grpo,mmr1_vas", "--lrs", "0.01", "--out", str(whole)]
    assert "lrs" in refused(argv, capsys)


def test_dry_run_shows_a_file_that_makes_the_same_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--methods", "rloo", "--methods", "grpo", "--tasks", "miniature:rare,miniature:mixed"]
    assert main(["compare", *argv, "--lr", "0.1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    found = tomllib.loads(text)["compare"]
    assert found["methods"] == ["rloo", "grpo"] and found["lrs"] == [0.03, 0.1, 0.3]
    assert "12 runs to tune" not in text and re.search(
        r"24 runs to tune .* 20 reported ones of 48 rollouts", text
    )
    assert "epochs" not in text  # or a method's own would not count when the file is read
    Path("compare.toml").write_text(text)
    assert main(["compare", "compare.toml", "--dry-run"]) == 0
    assert capsys.readouterr().out == text
    assert not Path("comparison").exists()


def test_all_takes_every_recipe_that_works_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--domain", "miniature", "--methods", "rloo,all", "--dry-run"]) == 0
    methods = tomllib.loads(capsys.readouterr().out)["compare"]["methods"]
    assert methods[0] == "rloo" and {"grpo", "bnpo", "ppo"} <= set(methods) and "bpo" not in methods
    assert len(set(methods)) == len(methods) > 20
