"""Trackers and progress: what they are told, and that none of them can end a run."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import polopt
from polopt.engine import tracking
from polopt.engine.progress import ProgressReporter, describe_iteration, printable, sample_table, score_table
from polopt.engine.run_folder import read_metrics
from polopt.engine.tracking import TRACKERS, Expendable, TrackerReporter, flatten
from polopt.errors import MissingExtraError
from polopt.miniature import SumModActor, SumModTask

EVENTS = ("start", "log", "message", "finish")


class Recorder:
    """A reporter that remembers what it was told, and fails on demand.

    Args:
        fails: event that raises.
        error: what it raises.
        after: how many calls of it go well first.
    """

    def __init__(self, fails: str = "", error: BaseException | None = None, after: int = 0) -> None:
        self.fails, self.error, self.after = fails, error or OSError("tracker is down"), after
        self.told: list[tuple[str, Any]] = []

    def _hear(self, event: str, *what: Any) -> None:
        self.told.append((event, what))
        if event == self.fails and sum(name == event for name, _ in self.told) > self.after:
            raise self.error

    def start(self, description: dict[str, Any], iteration: int) -> None:
        self._hear("start", description, iteration)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        self._hear("log", iteration, metrics)

    def message(self, text: str) -> None:
        self._hear("message", text)

    def finish(self, summary: dict[str, Any]) -> None:
        self._hear("finish", summary)

    @property
    def events(self) -> list[str]:
        return [name for name, _ in self.told]


def run(out: Path, *reporters: Any, resume: bool = False, iterations: int = 4) -> dict[str, Any]:
    """A short run of the miniature domain."""
    task: Any = SumModTask()
    config = polopt.TrainerConfig(iterations=iterations, prompts=4, rollouts=4, lr=0.01, score_prompts=6)
    description = {"trainer": config.model_dump(mode="json")}
    trainer = polopt.Trainer(
        SumModActor(task), task, polopt.recipe("grpo"), config, out=out, description=description, reporters=reporters
    )  # fmt: skip
    return trainer.run(resume)


@pytest.mark.parametrize("error", [OSError("down"), ValueError(), SystemExit(3), RuntimeError("two\nlines")])
@pytest.mark.parametrize(("event", "after"), [("start", 0), ("log", 0), ("log", 2), ("finish", 0)])
def test_failing_tracker_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, event: str, after: int, error: BaseException
) -> None:
    failing, healthy, warnings = Recorder(event, error, after), Recorder(), []
    summary = run(
        tmp_path, Expendable(failing, "tracker x", warnings.append), Expendable(healthy, "y", warnings.append)
    )
    assert not summary["interrupted"] and len(read_metrics(tmp_path)) == 4
    assert failing.events[-1] == event and failing.events.count(event) == after + 1
    assert healthy.events == ["start", *["log"] * 4, "finish"]
    (warning,) = warnings
    assert warning.startswith("tracker x failed") and type(error).__name__ in warning and "\n" not in warning


def test_interrupt_in_a_tracker_is_no_failure_of_the_tracker() -> None:
    reporter = Expendable(Recorder("log", KeyboardInterrupt()), "x", lambda text: None)
    with pytest.raises(KeyboardInterrupt):
        reporter.log(1, {})


def test_a_reporter_that_is_not_expendable_may_fail(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="down"):
        run(tmp_path, Recorder("log"))


class FakeTracker:
    """In place of accelerate's trackers: what it was made with and told."""

    made: list["FakeTracker"] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, []
        FakeTracker.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    from accelerate import tracking as theirs

    monkeypatch.setattr(FakeTracker, "made", [])
    monkeypatch.setattr(theirs, "LOGGER_TYPE_TO_CLASS", dict.fromkeys(TRACKERS, FakeTracker))
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    return FakeTracker


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_hears_configuration_metrics_and_scores(
    tmp_path: Path, fake: type[FakeTracker], name: str
) -> None:
    run(tmp_path / "run", TrackerReporter(name, tmp_path / "run"))
    (tracker,) = fake.made
    assert tracker.configuration["trainer/lr"] == 0.01
    assert tracker.calls[0] == "start" and tracker.calls[-1] == "finish"
    assert [call[0] for call in tracker.calls[1:-1]] == [1, 2, 3, 4, 4]
    assert "reward" in tracker.calls[1][1] and "after/score" in tracker.calls[-2][1]
    place = tracker.options.get("logging_dir") or tracker.options.get("dir") or tmp_path
    assert Path(place).is_relative_to(tmp_path)


def test_resumed_run_continues_its_curves(tmp_path: Path, fake: type[FakeTracker]) -> None:
    for iterations, resume in ((2, False), (4, True)):
        trackers = [TrackerReporter(name, tmp_path) for name in ("tensorboard", "trackio")]
        run(tmp_path, *trackers, resume=resume, iterations=iterations)
    tensorboard, trackio, tensorboard_again, trackio_again = fake.made
    assert (tensorboard.options["purge_step"], tensorboard_again.options["purge_step"]) == (None, 3)
    assert (trackio.options["resume"], trackio_again.options["resume"]) == ("never", "allow")
    assert trackio.options["name"] == trackio_again.options["name"] == tmp_path.name
    assert not hasattr(tensorboard_again, "configuration")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_each_iteration_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, TrackerReporter("tensorboard", tmp_path), iterations=3)
    stray = TrackerReporter("tensorboard", tmp_path)
    stray.start({}, 3)
    stray.log(4, {"reward": 99.0})  # was logged, but is in no checkpoint
    run(tmp_path, TrackerReporter("tensorboard", tmp_path), resume=True, iterations=5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rewards = events.Scalars("reward")
    assert [event.step for event in rewards] == [1, 2, 3, 4, 5]
    assert [event.value for event in rewards] == pytest.approx(
        [line["reward"] for line in read_metrics(tmp_path)]
    )


def test_missing_tracker_names_its_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'tensorboard.*pip install "polopt\[trackers\]"$'):
        TrackerReporter("tensorboard", tmp_path)
    with pytest.raises(MissingExtraError, match=r'pip install "polopt\[trackers\]" wandb$'):
        TrackerReporter("wandb", tmp_path)


def test_trackers_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_configuration_is_flattened_to_plain_values() -> None:
    nested = {"a": {"b": {"c": 1}, "d": None, "e": [1, "x"]}, "f": True, "g": "text"}
    assert flatten(nested) == {"a/b/c": 1, "a/e": "[1, 'x']", "f": True, "g": "text"}


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_progress_is_a_plain_line_per_iteration_where_there_is_no_terminal(tmp_path: Path) -> None:
    shown = console()
    with ProgressReporter(shown) as progress:
        run(tmp_path, progress)
    lines = [line for line in text_of(shown).splitlines() if re.match(r"\d/4  reward", line)]
    assert [line[0] for line in lines] == ["1", "2", "3", "4"]
    assert all(re.search(r"reward \d\.\d{3}  \d+ tokens/s  \d:\d\d:\d\d left$", line) for line in lines)
    assert (
        "before" in text_of(shown) and "after" in text_of(shown) and f"Results: {tmp_path}" in text_of(shown)
    )


def test_progress_is_one_moving_line_in_a_terminal_which_is_left_in_order(tmp_path: Path) -> None:
    shown = console(terminal=True)
    with pytest.raises(OSError, match="down"), ProgressReporter(shown) as progress:
        run(tmp_path, progress, Recorder("log", after=1))
    text = text_of(shown)
    assert "reward" in text and "2/4" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_quiet_progress_is_the_summary_alone(tmp_path: Path) -> None:
    shown = console(terminal=True)
    with ProgressReporter(shown, quiet=True) as progress:
        run(tmp_path, progress)
    assert "reward" not in text_of(shown) and "score" in text_of(shown)


def test_iteration_line_names_scores_and_faults() -> None:
    metrics = {
        "reward": 0.5,
        "time/iteration": 2.0,
        "tokens": 100.0,
        "score": 0.75,
        "score/low": 0.5,
        "score/high": 1.0,
    }
    faults = {"faults/calls": 64.0, "faults/missing": 3.0, "faults/errors": 2.0, "faults/timeouts": 1.0}
    line = describe_iteration(metrics | faults, 65)
    assert line == "reward 0.500  score 0.750 [0.500, 1.000]  50 tokens/s  3 reward faults  0:01:05 left"


def test_scores_have_their_intervals_and_may_lack_a_statistic() -> None:
    shown = console()
    before = {"score": 0.25, "score/low": 0.125, "score/high": 0.5, "samples": []}
    after = {
        "score": 0.75,
        "score/low": 0.5,
        "score/high": 1.0,
        "pass@2": 0.9,
        "pass@2/low": 0.8,
        "pass@2/high": 1.0,
    }
    shown.print(score_table({"before": before, "after": after}))
    rows = [re.findall(r"[-\w.@]+", line) for line in text_of(shown).splitlines()]
    assert ["score", "0.250", "0.125", "0.500", "0.750", "0.500", "1.000"] in rows
    assert ["pass@2", "-", "0.900", "0.800", "1.000"] in rows


HOSTILE = "[red]x[/red] \x1b]0;title\x07 \x9b31m \u202eevil [/nonsense] \r\x00 end"


def test_hostile_completions_are_shown_and_not_obeyed() -> None:
    shown = console()
    sample = {"prompt": [{"role": "user", "content": HOSTILE}], "completion": HOSTILE}
    shown.print(sample_table([(sample, {**sample, "completion": [1, 2]})]))
    text = text_of(shown)
    assert not set("\x1b\x07\x9b\u202e\r\x00") & set(text)
    assert "[red]x[/red]" in text and "\\x1b]0;title" in text and "[1, 2]" in text


def test_long_prompts_show_their_end_and_long_completions_their_beginning() -> None:
    shown = console()
    sample = {"prompt": "Q: first\nA: 1\nQ: second\nA:", "completion": "a" * 1000 + "z"}
    shown.print(sample_table([(sample, sample)]))
    text = text_of(shown)
    assert "first" not in text and "Q: second\\nA:" in text and "z" not in text


@given(st.text())
def test_printable_text_is_one_line_without_invisible_characters(text: str) -> None:
    assert all(character.isprintable() for character in printable(text))


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
