"""The commands: what they write, show and return."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.cli import COMMANDS, main
from polopt.cli.building import build, claim_folder, close, resolve
from polopt.cli.domains import DOMAINS
from polopt.config import SECTIONS, RunConfig, configure
from polopt.engine.optimization import DivergedError
from polopt.engine.run_folder import read_metrics
from polopt.registry import recipe_domains, recipes
from polopt.trainer import Trainer

SURFACE = Path(__file__).with_name("surface.json")
TINY = [
    *("--model", "tiny:2x32", "--max-new-tokens", "4", "--task", "builtin:reverse", "--task-option", "shots=1"),
    *("--iterations", "3", "--prompts", "4", "--rollouts", "4", "--score-prompts", "8"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 0) -> str:
    """What a command writes to its output."""
    assert main(argv) == code
    return capsys.readouterr().out


def surface() -> dict[str, Any]:
    """Commands with their flags, and the keys of a configuration: what users write."""
    flags = {}
    for command in COMMANDS:
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            main([command, "--help"])
        listed = [
            line.strip().split("  ")[0] for line in text.getvalue().splitlines() if line.startswith("  -")
        ]
        flags[command] = sorted(re.findall(r"--[a-z-]+", " ".join(listed)))
    keys = {"": sorted(set(RunConfig.model_fields) - set(SECTIONS))}
    return {
        "flags": flags,
        "keys": keys | {name: sorted(model.model_fields) for name, model in SECTIONS.items()},
    }


def test_public_surface_changes_only_on_purpose() -> None:
    """To accept a change: python tests/test_cli.py."""
    assert surface() == json.loads(SURFACE.read_text())


def test_flags_are_unambiguous_and_documented() -> None:
    from polopt.cli.flags import run_flags

    flags = [flag for group in run_flags().values() for flag in group]
    assert len({flag.name for flag in flags}) == len(flags)
    assert all(flag.field.description for flag in flags)


def test_train_writes_a_run_folder_and_shows_scores_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(capsys, ["train", *TINY])
    run = Path("runs/grpo-reverse-001")
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints"
    }  # fmt: skip
    assert [line["iteration"] for line in read_metrics(run)] == [1, 2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert not summary["interrupted"] and {"score", "score/low", "score/high"} <= summary["after"].keys()
    assert configure(json.loads((run / "config.json").read_text())).out == run
    for expected in (
        "1/3  reward",
        "tokens/s",
        "left",
        "before",
        "after",
        "Completion before",
        "Q: reverse",
        str(run),
    ):
        assert expected in output


def test_runs_without_a_name_get_folders_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*TINY, "--iterations", "0", "--quiet"]
    first, second = shown(capsys, ["train", *quick]), shown(capsys, ["train", *quick])
    assert "grpo-reverse-001" in first and "grpo-reverse-002" in second
    assert "reward" not in first


@pytest.mark.parametrize(
    ("domain", "task", "name"),
    [
        ("control", "Pendulum-v1", "grpo-Pendulum-v1"),
        ("control", "polopt/LQR-v0", "grpo-LQR-v0"),
        ("language", "jsonl:data/questions.jsonl", "grpo-questions"),
        ("language", "python:tasks.py:make", "grpo-make"),
    ],
)
def test_run_without_a_name_goes_by_method_and_task(domain: str, task: str, name: str) -> None:
    config = RunConfig.create("", domain=domain, task=task)
    assert claim_folder(config) == Path(f"runs/{name}-001")


def test_folder_that_holds_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *TINY, "--iterations", "0", "--quiet", "--out", "run"]
    shown(capsys, argv)
    assert main(argv) == 2
    assert "polopt resume run" in capsys.readouterr().err


def test_refused_run_leaves_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, ["train", "--model", "tiny:2", "--out", "run"], code=2)
    assert not Path("run").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, iteration: int, times: int = 1) -> None:
    """Press Ctrl-C during an iteration."""
    iterate = Trainer.iterate

    def interrupted(self: Trainer) -> Any:
        if self.iteration == iteration:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return iterate(self)

    monkeypatch.setattr(Trainer, "iterate", interrupted)


def without_clock(run: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
        for line in read_metrics(run)
    ]


def test_interrupted_run_says_how_to_go_on_and_resumes_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, ["train", *TINY, "--out", "whole"])
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        output = shown(capsys, ["train", *TINY, "--out", "broken"], code=130)
    assert "Interrupted after 2 iterations; go on: polopt resume broken" in output
    shown(capsys, ["resume", "broken"])
    assert without_clock("whole") == without_clock("broken")


def test_second_interrupt_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 1, times=2)
    output = shown(capsys, ["train", *TINY, "--out", "run"], code=130)
    assert "polopt resume run" in output
    monkeypatch.undo()


def test_interrupt_before_anything_runs_has_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polopt.cli.train.prepare", pressed)
    assert main(["train", *TINY]) == 130
    assert capsys.readouterr().err == "polopt: interrupted\n"


def test_diverged_run_has_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverged(self: Trainer) -> None:
        raise DivergedError("6 updates in a row were not finite")

    monkeypatch.setattr(Trainer, "iterate", diverged)
    assert main(["train", *TINY]) == 3
    assert capsys.readouterr().err == "polopt: 6 updates in a row were not finite\n"


def test_finished_run_resumes_only_for_more_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, ["train", *TINY, "--out", "run"])
    assert main(["resume", "run"]) == 2
    assert "--iterations" in capsys.readouterr().err
    shown(capsys, ["resume", "run", "--iterations", "5"])
    assert [line["iteration"] for line in read_metrics("run")] == [1, 2, 3, 4, 5]


def test_damaged_checkpoints_are_passed_over_and_then_fail_with_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown(capsys, ["train", *TINY, "--out", "run", "--checkpoint-every", "1"])
    newest = max(Path("run/checkpoints").glob("iteration-*"))
    damage(newest)
    assert f"{newest.name} is damaged" in shown(capsys, ["resume", "run", "--iterations", "4"])
    for path in Path("run/checkpoints").glob("iteration-*"):
        damage(path)
    for argv in (["resume", "run", "--iterations", "5"], ["eval", "run"]):
        assert main(argv) == 1
        message = capsys.readouterr().err
        assert "safetensors" in message and message.count("\n") == 1


def damage(checkpoint: Path) -> None:
    """Flip one bit of the weights."""
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_eval_scores_a_checkpoint_as_the_run_did(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, ["train", *TINY, "--out", "run", "--checkpoint-every", "1", "--keep", "9"])
    output = shown(capsys, ["eval", "run"])
    after = json.loads(Path("run/summary.json").read_text())["after"]
    assert f"{after['score']:.3f} [{after['score/low']:.3f}, {after['score/high']:.3f}]" in output
    assert "iteration 3" in output and "8 held-out prompts" in output
    several = shown(capsys, ["eval", "run", "--checkpoint", "1", "--rollouts", "4", "--temperature", "1"])
    assert "iteration 1" in several and "pass@4" in several and "majority" in several
    assert main(["eval", "run", "--checkpoint", "7"]) == 2
    assert "0, 1, 2, 3" in capsys.readouterr().err
    assert main(["eval", "run", "--rollouts", "4"]) == 2
    assert capsys.readouterr().err.startswith("polopt: --rollouts = 4: greedy")


def test_changed_configuration_of_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, ["train", *TINY, "--out", "run"])
    file = Path("run/config.json")
    config = json.loads(file.read_text())
    config["trainer"]["lr"] = 1.0
    file.write_text(json.dumps(config))
    assert main(["resume", "run", "--iterations", "5"]) == 1
    assert "configuration" in capsys.readouterr().err
    config["trainer"]["lr"] = "high"
    file.write_text(json.dumps(config))
    assert main(["resume", "run"]) == 2
    assert "config.json: trainer.lr = 'high'" in capsys.readouterr().err


def test_dry_run_loads_no_weights_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("polopt.language.model.load_language_model", loaded)
    monkeypatch.setattr("polopt.language.actor.load_language_model", loaded)
    output = shown(capsys, ["train", "--dry-run", "--regularizer", "kl"])
    comments = "\n".join(line for line in output.splitlines() if line.startswith("#"))
    for expected in (
        "134.5 million parameters",
        "reference 0.54 GB",
        "memory: about",
        "s per iteration",
        "GFLOP/s",
    ):
        assert expected in comments
    assert not list(Path().iterdir())


def test_dry_run_counts_lora_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(capsys, ["train", "--dry-run", "--lora-rank", "8"])
    trained = re.search(r"134\.5 million parameters, (\d+\.\d) million trained", output)
    assert trained and 2.0 < float(trained[1]) < 3.0


@pytest.mark.parametrize("task", ["Pendulum-v1", "polopt/ShipSteering-v0"])
def test_an_environment_without_its_domain_is_refused_with_the_flag(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--env", task, "--dry-run"]) == 2
    assert "--domain control" in capsys.readouterr().err
    assert main(["train", "--task", "7", "--dry-run"]) == 2
    assert "allowed: builtin:largest" in capsys.readouterr().err


def test_warm_up_teaches_the_form_of_answers(capsys: pytest.CaptureFixture[str]) -> None:
    warm = [
        "--model",
        "tiny:2x64:char",
        "--warm-up",
        "60",
        "--task",
        "builtin:largest",
        "--task-option",
        "digits=1",
    ]
    sizes = [
        "--task-option",
        "count=2",
        "--task-option",
        "shots=1",
        "--max-new-tokens",
        "4",
        "--iterations",
        "0",
    ]
    shown(capsys, ["train", *warm, *sizes, "--out", "run", "--quiet"])
    samples = json.loads(Path("run/summary.json").read_text())["before"]["samples"]
    assert all(re.fullmatch(r" \d\n?", sample["completion"]) for sample in samples), samples


PLUGIN = """
from polopt import Method, register, register_recipe
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip

@register("mine")
class Mine(GroupStandardized):
    '''My advantage.'''

@register_recipe("my_method")
def my_method():
    '''My method.'''
    return Method(advantage=Mine(), surrogate=PPOClip())
"""


def test_plugins_bring_methods_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(PLUGIN)
    shown(capsys, ["train", *TINY, "--plugin", "mine.py", "--method", "my_method", "--out", "run"])
    shown(capsys, ["train", *TINY, "--plugin", "mine.py", "--advantage", "mine", "--iterations", "0"])
    Path("broken.py").write_text("import nothing_of_this_name")
    assert main(["train", "--plugin", "broken.py"]) == 2
    assert "nothing_of_this_name" in capsys.readouterr().err


def test_further_rewards_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rewards.py").write_text(
        "def brevity(completion, **rest):\n    return -float(len(completion))\n\n"
        "def broken(completion, **rest):\n    raise ValueError('no')\n"
    )
    rewards = ["--reward", "python:rewards.py:brevity", "--reward", "python:rewards.py:broken"]
    output = shown(capsys, ["train", *TINY, *rewards, "--advantage", "gdpo", "--out", "run"])
    assert {"reward/exact", "reward/brevity", "reward/broken"} <= read_metrics("run")[0].keys()
    assert "16 reward faults" in output
    assert "score/brevity" in shown(capsys, ["eval", "run"])


def test_methods_lists_every_recipe_and_part(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, ["methods", "--json"]), parse_constant=lambda name: pytest.fail(name))
    grpo = next(recipe for recipe in found["recipes"] if recipe["name"] == "grpo")
    assert (grpo["arxiv"], grpo["slots"]["advantage"], grpo["slots"]["surrogate"]) == (
        "2402.03300",
        ["grpo"],
        ["ppo"],
    )
    assert next(r for r in found["recipes"] if r["name"] == "ppo")["defaults"] == {
        "epochs": 4,
        "minibatches": 4,
    }
    assert next(r for r in found["recipes"] if r["name"] == "sac")["defaults"]["max_grad_norm"] == "Infinity"
    ppo = next(part for part in found["slots"]["surrogate"] if part["name"] == "ppo")
    clip = next(option for option in ppo["options"] if option["name"] == "clip_high")
    assert (clip["type"], clip["default"]) == ("float", 0.2) and "ratios" in clip["description"].lower()
    text = " ".join(shown(capsys, ["methods"]).split())
    assert all(recipe["name"] in text for recipe in found["recipes"])
    assert "Slot surrogate" in text and "needs" in text


def test_tasks_lists_tasks_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, ["tasks", "--json"]))["language"]
    largest = next(task for task in found if task["spec"] == "builtin:largest")
    assert "count" in [parameter["name"] for parameter in largest["parameters"]]
    assert "builtin:largest" in shown(capsys, ["tasks"])


def test_help_of_every_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(command in shown(capsys, ["--help"]) for command in COMMANDS)
    assert "exit codes" in shown(capsys, [])
    assert shown(capsys, ["--version"]).startswith("polopt ")
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
    help_of_train = " ".join(capsys.readouterr().out.split())
    assert "Learning rate at its peak. (default 1e-05, > 0)" in help_of_train


def test_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from polopt.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    )
    program += "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


def test_output_into_a_closed_pipe_is_no_error() -> None:
    program = "import sys; from polopt.cli import main; sys.exit(main(['train', '--help']))"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


def test_idle_threads_soon_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_run_folders_differ_only_in_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, ["train", *TINY, "--out", "a"])
    shown(capsys, ["train", *TINY, "--out", "b"])
    assert without_clock("a") == without_clock("b")
    shown(capsys, ["train", *TINY, "--out", "c", "--seed", "1"])
    assert without_clock("a") != without_clock("c")


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_domain_promises_what_its_actor_provides(method: str) -> None:
    config = configure({"method": method, "language": {"model": "tiny:2x32"}, "trainer": {"iterations": 0}})
    trainer = build(config)
    close(trainer)
    critic = set() if method == "ppo" else {"value"}
    assert DOMAINS["language"].provides() - critic == trainer.actor.provides
    assert trainer.config == config.trainer.with_defaults(trainer.method.defaults)
    assert all(torch.isfinite(p).all() for p in trainer.parameters)


@pytest.mark.parametrize("method", sorted(recipes()))
def test_every_recipe_is_taken(method: str) -> None:
    for domain in recipe_domains(method) or ("language", "miniature"):
        resolve(configure({"domain": domain, "method": method, "language": {"model": "tiny:2x32"}}))


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
