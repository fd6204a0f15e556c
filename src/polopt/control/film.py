"""A held-out episode as a film: the first one of a score, as the policy acts there."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from polopt.control.actor import ControlActor
from polopt.control.task import ControlTask
from polopt.control.vector import VectorEnvironments
from polopt.domain import Plan, Rollout
from polopt.errors import ConfigError, MissingExtraError

RATE = 30.0
"""Frames per second of a film, about: of an environment that has more only every second, third, ... is kept."""
Write = Callable[[np.ndarray], None]
"""Takes a frame, [height, width, 3] of bytes."""


def check_film(file: Path, task: ControlTask) -> None:
    """Refuse a film that cannot be made, before anything is loaded.

    Raises:
        ConfigError: neither .gif nor .mp4, no folder for it, or an environment without pictures.
        MissingExtraError: the library that writes it is not installed.
    """
    if file.suffix not in WRITERS:
        raise ConfigError(f"--render = '{file}': must end in {' or '.join(WRITERS)}")
    library, _ = WRITERS[file.suffix]
    if find_spec(library) is None:
        raise MissingExtraError(
            f"--render = '{file}': needs {library}, which is not installed: pip install \"polopt[control]\""
        )
    if not os.path.isdir(file.parent):
        raise ConfigError(f"--render = '{file}': there is no folder '{file.parent}'")
    if "rgb_array" not in task.metadata.get("render_modes", []):
        raise ConfigError(f"--render = '{file}': the environment {task.name!r} has no pictures (rgb_array)")


def film(actor: ControlActor, task: ControlTask, generator: torch.Generator, file: Path) -> Rollout:
    """Write the first held-out episode of the score that `generator` draws.

    Args:
        actor: acts as its configuration says for scores.
        task: see `check_film`.
        generator: that of the score.
        file: where the film goes, .gif or .mp4; replaced if it is there.

    Returns:
        The episode.

    Raises:
        ConfigError: the environment cannot draw here, for lack of a library or of OpenGL.
    """
    rate = float(task.metadata.get("render_fps", RATE))
    every = max(1, round(rate / RATE))
    _, writing = WRITERS[file.suffix]
    plan = Plan(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), heldout=True)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen, and says so otherwise
    with writing(file, rate / every) as write, closing(_FilmedTask(task, write, every)) as filmed:
        return actor.rollout(filmed, plan, generator)


class _FilmedTask(ControlTask):
    """A task whose whole episodes are in one environment, in front of a camera."""

    def __init__(self, task: ControlTask, write: Write, every: int) -> None:
        config = task.config.model_copy(update={"vectorization": "sync"})
        super().__init__(task.name, config, {**task.options, "render_mode": "rgb_array"})
        self._write, self._every = write, every

    def whole_episodes(self, count: int) -> VectorEnvironments:
        camera = partial(_Camera, write=self._write, every=self._every)
        self._whole = VectorEnvironments(self.name, 1, options=self.options, wrappers=(camera,))
        return self._whole


class _Camera(gymnasium.Wrapper):
    """Gives every so many frames to a function, those of one episode after the other."""

    def __init__(self, env: Any, write: Write, every: int) -> None:
        super().__init__(env)
        self._write, self._every, self._steps = write, every, 0

    def reset(self, **options: Any) -> Any:
        self._steps = 0
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        if self._steps == 0:  # a start is drawn once its episode goes on
            self._write(self._picture())
        found = super().step(action)
        self._steps += 1
        if self._steps % self._every == 0:
            self._write(self._picture())
        return found

    def _picture(self) -> Any:
        try:
            return self.env.render()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"--render: the environment cannot draw here, {reason[0]}; without a screen MuJoCo needs "
                "MUJOCO_GL=egl or MUJOCO_GL=osmesa"
            ) from error


@contextmanager
def _gif(file: Path, rate: float) -> Iterator[Write]:
    from PIL import Image

    frames: list[Any] = []
    yield lambda frame: frames.append(
        Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE)  # a third of the memory
    )
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=1000 / rate, loop=0)


@contextmanager
def _mp4(file: Path, rate: float) -> Iterator[Write]:
    from imageio.v2 import get_writer

    writer: Any = get_writer(file, fps=rate, macro_block_size=2)
    with writer:
        yield writer.append_data


WRITERS = {".gif": ("PIL", _gif), ".mp4": ("imageio_ffmpeg", _mp4)}
"""By ending: the library that is needed, and what opens a file to write frames to."""
