"""Trackers: found by path, checked in the recipe, and unable to end a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dummy_trackers import Recording
from forerun.config import load_recipe
from forerun.errors import UserError
from forerun.tracking.trackers import RunInfo, load_trackers

RUN = RunInfo(Path("runs/r"), "quickstart", {"seed": 0})


@pytest.fixture(autouse=True)
def forgotten() -> None:
    Recording.calls.clear()


def test_a_tracker_from_outside_the_package_is_loaded_by_its_path() -> None:
    (tracker,) = load_trackers(["dummy_trackers:Recording"])
    tracker.start(RUN)
    tracker.log(1, {"reward/mean": 0.5})
    tracker.finish({"steps": 1})
    assert Recording.calls == [("start", "quickstart", 0), ("log", 1, {"reward/mean": 0.5}), ("finish", {"steps": 1})]
    assert tracker.failures == 0


def test_a_tracker_that_fails_is_warned_about_once_counted_and_called_again() -> None:
    warned: list[str] = []
    (tracker,) = load_trackers(["dummy_trackers:Offline"], warned.append)
    tracker.start(RUN)
    for step in (1, 2, 3):
        tracker.log(step, {})
    tracker.finish({})
    assert warned == [
        "The tracker 'dummy_trackers:Offline' failed at step 1 (ConnectionError: no route); the run goes on."
    ]
    assert tracker.failures == 3 and Recording.calls[-1] == ("finish", {})


def test_without_a_consumer_the_warning_is_a_python_warning() -> None:
    (tracker,) = load_trackers(["dummy_trackers:Offline"])
    with pytest.warns(UserWarning, match="failed at step 1"):
        tracker.log(1, {})


def test_a_tracker_that_cannot_start_stops_the_run_before_it_begins() -> None:
    (tracker,) = load_trackers(["dummy_trackers:NoLogin"])
    with pytest.raises(UserError, match=r"dummy_trackers:NoLogin' cannot start \(RuntimeError: no API key\)"):
        tracker.start(RUN)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("wandbb", "No tracker is called 'wandbb'"),
        ("dummy_trackers:Nobody", "cannot be imported from dummy_trackers:Nobody"),
        ("dummy_trackers:NeedsArguments", "cannot be constructed: TypeError"),
        ("dummy_trackers:Incomplete", "has no method log and no finish"),
    ],
)
def test_a_tracker_that_is_none_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_trackers([name])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_names_trackers_and_refuses_unknown_ones() -> None:
    assert load_recipe("quickstart").trackers == []
    assert load_recipe("quickstart", {"trackers": "[dummy_trackers:Recording]"}).trackers == [
        "dummy_trackers:Recording"
    ]
    with pytest.raises(UserError, match="No tracker is called 'wandbb'") as error:
        load_recipe("quickstart", {"trackers": "[wandbb]"})
    assert "package.module:Name" in str(error.value)
