"""Policies of finished runs: loaded from the folder, filmed by `polopt eval`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polopt.cli import main
from polopt.cli.building import build, close
from polopt.config import RunConfig
from polopt.control import film as films
from polopt.control import load_policy
from polopt.engine.seeding import generator
from polopt.errors import CheckpointError, ConfigError

SIZES = {"iterations": 2, "prompts": 2, "rollouts": 1, "epochs": 1, "minibatches": 1, "score_prompts": 2}


def run(out: Path, task: str = "CartPole-v1", method: str = "ppo", **control: Any) -> Any:
    """A finished run of two iterations."""
    settings = {"domain": "control", "task": task, "method": method}
    control = {"horizon": 16, "normalize_observations": True, "normalize_rewards": True, **control}
    sizes = {**SIZES, "keep": 9, "learning_starts": 16}
    trainer = build(RunConfig.create("", **settings, trainer=sizes, control=control), out=out)
    trainer.run()
    close(trainer)
    return trainer


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("runs") / "cartpole")


@pytest.fixture(scope="module")
def folder(cartpole: Any) -> Path:
    return cartpole.record.folder.path


@pytest.mark.parametrize(
    ("task", "control"),
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {"dtype": "float64"}),
        (
            "Pendulum-v1",
            {"distribution": "squashed", "state_dependent_std": True, "normalize_observations": False},
        ),
        ("polopt/LQR-v0", {"hidden": [8]}),
    ],
)
@pytest.mark.parametrize("method", ["ppo", "bpo", "reinforce"])
def test_a_loaded_policy_acts_as_the_trained_one(
    task: str, control: dict[str, Any], method: str, tmp_path: Path
) -> None:
    trainer = run(tmp_path / "run", task, method, **control)
    policy = load_policy(tmp_path / "run")
    space = trainer.task.observation_space
    seen = np.random.default_rng(0).normal(size=(5, *space.shape)).astype(space.dtype)
    actions = policy(seen)
    np.testing.assert_array_equal(actions, trainer.actor.act(seen))
    for row in range(5):
        one = policy(seen[row])
        assert one in trainer.task.action_space
        np.testing.assert_allclose(one, actions[row], rtol=1e-5)


@pytest.mark.parametrize("hidden", [None, [16]])
def test_a_loaded_off_policy_agent_acts_as_the_trained_one(hidden: list[int] | None, tmp_path: Path) -> None:
    open_fields = {"normalize_observations": False, "normalize_rewards": False, "hidden": hidden}
    trainer = run(tmp_path / "run", "Pendulum-v1", "sac", **open_fields)
    seen = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_array_equal(load_policy(tmp_path / "run")(seen), trainer.actor.act(seen))


def test_observations_are_normalised_as_in_training(folder: Path) -> None:
    policy = load_policy(folder)
    moments = policy.networks.observation_moments
    assert moments is not None and float(moments.count) > 0
    assert moments.mean.dtype == torch.float64
    seen = np.array([0.1, -0.2, 0.3, -0.4], dtype=np.float32)
    before = policy.networks.acting()(torch.from_numpy(seen[None]))
    moments.mean += 1
    assert not torch.equal(policy.networks.acting()(torch.from_numpy(seen[None])), before)


def test_stochastic_actions_are_drawn_from_the_policy_and_repeat_by_seed(folder: Path) -> None:
    policy, again = load_policy(folder, seed=3), load_policy(folder, seed=3)
    seen = np.zeros((4000, 4), dtype=np.float32)
    actions = policy(seen, stochastic=True)
    np.testing.assert_array_equal(actions, again(seen, stochastic=True))
    assert (policy(seen, stochastic=True) != actions).any()
    wanted = float(policy.networks.acting()(torch.zeros(1, 4)).softmax(-1)[0, 1])
    assert actions.mean() == pytest.approx(wanted, abs=5 * 0.5 / 4000**0.5)


def test_an_earlier_checkpoint_is_loaded(folder: Path) -> None:
    first, last = load_policy(folder, iteration=0), load_policy(folder, iteration=2)
    seen = torch.ones(1, 4)
    assert torch.equal(load_policy(folder).networks.acting()(seen), last.networks.acting()(seen))
    assert not torch.equal(first.networks.acting()(seen), last.networks.acting()(seen))
    with pytest.raises(CheckpointError, match="iteration-000007"):
        load_policy(folder, iteration=7)


def test_what_cannot_be_loaded_or_seen_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"domain": "language"}')
    with pytest.raises(ConfigError, match="domain 'language'"):
        load_policy(tmp_path)
    with pytest.raises(ConfigError, match=r"shape \(3,\).*\(E, 4\)"):
        load_policy(folder)(np.zeros(3))


def test_polopt_control_offers_the_policy_without_loading_torch_before() -> None:
    program = "import sys, polopt.control\nassert 'torch' not in sys.modules\npolopt.control.load_policy"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def evaluated(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["eval", *argv]) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


@pytest.mark.parametrize("policy", ["deterministic", "stochastic"])
def test_the_film_is_the_first_episode_of_the_score(cartpole: Any, policy: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("pygame")
    config = cartpole.actor.config
    cartpole.actor.config = config.model_copy(update={"score_policy": policy})
    draws = generator(0, "score", cartpole.iteration)
    scored = cartpole.score()["samples"]
    made = films.film(cartpole.actor, cartpole.task, draws, tmp_path / "film.gif")
    cartpole.actor.config = config
    assert made.samples == scored[:1]
    steps = int(made.batch.mask.sum())
    with image.open(tmp_path / "film.gif") as film:
        assert 1 < film.n_frames <= 1 + steps // 2  # every second of 50 a second; equal ones are joined
        assert film.size == (600, 400) and film.info["duration"] == 40


def test_eval_writes_films_and_scores_both_policies(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pygame")
    file = tmp_path / "film.mp4"
    shown = evaluated(capsys, str(folder), "--policy", "both", "--render", str(file))
    assert "return" in shown and "deterministic" in shown and "stochastic" in shown
    assert b"ftyp" in file.read_bytes()[:16]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--render", "film.avi"], ["film.avi", ".gif or .mp4"]),
        (["--render", "absent/film.gif"], ["absent", "no folder"]),
        (["--policy", "greedy"], ["--policy", "greedy", "deterministic"]),
        (["--temperature", "1"], ["--temperature", "language", "control"]),
    ],
)
def test_eval_refuses_in_one_line(
    folder: Path, argv: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = evaluated(capsys, str(folder), *argv, code=2)
    assert message.count("\n") == 1 and all(name in message for name in names), message


def test_films_that_cannot_be_are_refused(
    cartpole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "lqr", "polopt/LQR-v0")
    file = str(tmp_path / "film.gif")
    assert "no pictures" in evaluated(capsys, str(tmp_path / "lqr"), "--render", file, code=2)
    assert main(["train", "--domain", "miniature", "--iterations", "0", "--out", str(tmp_path / "sums")]) == 0
    capsys.readouterr()
    assert "'control'" in evaluated(capsys, str(tmp_path / "sums"), "--render", file, code=2)
    monkeypatch.setattr(films, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"imageio_ffmpeg.*polopt\[control\]"):
        films.check_film(tmp_path / "film.mp4", cartpole.task)


def test_an_environment_that_cannot_draw_here_is_one_line(
    cartpole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gymnasium.envs.classic_control import CartPoleEnv

    def render(self: Any) -> None:
        raise RuntimeError("no OpenGL here\nand more")

    monkeypatch.setattr(CartPoleEnv, "render", render)
    with pytest.raises(ConfigError, match=r"cannot draw here, no OpenGL here; .*MUJOCO_GL=egl"):
        films.film(cartpole.actor, cartpole.task, generator(0, "score", 2), tmp_path / "film.gif")
    assert not (tmp_path / "film.gif").exists()
