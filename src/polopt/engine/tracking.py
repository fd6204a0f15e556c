"""Trackers: the metrics of a run, sent to TensorBoard, trackio, W&B and others through accelerate's.

A tracker is never worth a run: one that fails is reported once and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polopt.errors import MissingExtraError

if TYPE_CHECKING:
    from polopt.engine.record import Reporter

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Trackers that accelerate knows; each has the name of the library it needs."""
_EXTRA = ("tensorboard", "trackio")


def require_tracker(name: str) -> None:
    """Refuse a tracker that cannot work here.

    Raises:
        MissingExtraError: its library, or accelerate, is not installed.
    """
    for module in (name, "accelerate"):
        if find_spec(module) is None:
            extra = f'"polopt[trackers]"{"" if name in _EXTRA else f" {name}"}'
            raise MissingExtraError(
                f"trackers = {name!r}: needs {module}, which is not installed: pip install {extra}"
            )


class TrackerReporter:
    """Reports to one of accelerate's trackers.

    What is logged in `folder`: TensorBoard's files, in `folder/tensorboard`. The others keep to their own places, under
    the project "polopt" and the folder's name. A resumed run goes on in the same TensorBoard curves and trackio run; in
    other trackers it is a new run of the same name.

    Args:
        name: one of `TRACKERS`.
        folder: the run's folder.

    Raises:
        MissingExtraError: the tracker's library, or accelerate, is not installed.
    """

    def __init__(self, name: str, folder: Path) -> None:
        require_tracker(name)
        self.name, self.folder = name, folder
        self._tracker: Any = None

    def start(self, description: dict[str, Any], iteration: int) -> None:
        """Open the tracker; what it has of later iterations, from before an interrupt, is hidden where it can be."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._tracker = LOGGER_TYPE_TO_CLASS[self.name](**self._options(iteration))
        self._tracker.start()
        if not iteration:
            self._tracker.store_init_configuration(flatten(description))

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Send the metrics of an iteration."""
        self._tracker.log(metrics, step=iteration)

    def message(self, text: str) -> None:
        """Messages are for people: not sent."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the scores and close the tracker."""
        after = {
            f"after/{name}": value for name, value in summary["after"].items() if isinstance(value, float)
        }
        if after:
            self._tracker.log(after, step=summary["iteration"])
        self._tracker.finish()

    def _options(self, iteration: int) -> dict[str, Any]:
        if self.name == "tensorboard":
            purge = iteration + 1 if iteration else None
            return {"run_name": "", "logging_dir": self.folder / "tensorboard", "purge_step": purge}
        if self.name == "trackio":
            resume = "allow" if iteration else "never"
            return {"run_name": "polopt", "name": self.folder.name, "resume": resume, "embed": False}
        if self.name == "wandb":
            return {"run_name": "polopt", "name": self.folder.name, "dir": self.folder}
        return {"run_name": "polopt"}


class Expendable:
    """A reporter that a run can do without: its first failure is reported, and it hears no more.

    Args:
        reporter: what may fail.
        name: what it is called in the warning.
        warn: gets the warning.
    """

    def __init__(self, reporter: Reporter, name: str, warn: Callable[[str], None]) -> None:
        self._reporter: Reporter | None = reporter
        self._name, self._warn = name, warn

    def start(self, description: dict[str, Any], iteration: int) -> None:
        """The run begins."""
        self._tell("start", description, iteration)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """An iteration is done."""
        self._tell("log", iteration, metrics)

    def message(self, text: str) -> None:
        """Something a person should know."""
        self._tell("message", text)

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is over."""
        self._tell("finish", summary)

    def _tell(self, event: str, *arguments: Any) -> None:
        if self._reporter is None:
            return
        try:
            getattr(self._reporter, event)(*arguments)
        except (Exception, SystemExit) as error:
            self._reporter = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"{self._name} failed and is dropped, the run goes on ({reason[:300]})")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested values as one level, "trainer/lr"; lists as text, None left out."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, str | int | float):
            flat[prefix + name] = value
        elif value is not None:
            flat[prefix + name] = str(value)
    return flat
