"""A run: its parts built, resumed from a checkpoint, restarted after a loss, and finished.

`run` is the whole of it; what happens between the first and the last step is `loop.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from forerun.config import Recipe
from forerun.drafters import load_drafter
from forerun.errors import Interrupted, UserError, WorkersLost
from forerun.events import EventStream, Finished, Note, Warned, as_stage
from forerun.models import load_policy
from forerun.report.run_page import write_report
from forerun.simulate.plan.predict import Prediction, compare, predict_recipe
from forerun.tracking.environment import machine_line
from forerun.tracking.reader import overlap
from forerun.tracking.run_folder import RunFolder
from forerun.tracking.run_lock import RunLock
from forerun.tracking.trackers import RunInfo
from forerun.training.checkpoint import (
    complete_checkpoints,
    from_newest,
    policy_folder,
    read_history,
    reading,
    restore,
)
from forerun.training.data import load_data, prepare_data
from forerun.training.drafter import prepare_drafter
from forerun.training.ending import as_sentence, leave_checkpoint
from forerun.training.export import export
from forerun.training.history import History
from forerun.training.interrupt import stop_request
from forerun.training.loop import train_steps
from forerun.training.prefetch import AsynchronousSource
from forerun.training.prompts import open_policy, warm_up
from forerun.training.restart import Restarts
from forerun.training.resume import resumed_recipe as resumed_recipe
from forerun.training.rollout import SynchronousSource
from forerun.training.state import Run
from forerun.training.weights import pack_weights

PATHS = ("metrics", "rollouts", "timeline", "config", "env", "summary", "report")  # of a run folder, for the summary


def run(recipe: Recipe, resume: Path | None = None) -> EventStream[dict[str, Any]]:
    """Train; returns the summary that is also written to the run folder.

    A run that loses a worker goes on from its newest checkpoint, `checkpoint.restarts` times at most.

    Args:
        resume: run folder whose newest checkpoint to continue; the recipe is that run's own.

    Raises:
        UserError: something of the user's is wrong. Interrupted: a signal. Whatever ends a run after its first step
        leaves a checkpoint first, see `leave_checkpoint`.
    """
    restarts = Restarts(recipe.checkpoint.restarts)
    begin: Callable[[], EventStream[Run]] = partial(resume_run, resume, recipe) if resume else partial(new_run, recipe)
    warnings: list[str] = []
    with stop_request() as stop, closing(RunLock()) as lock:
        while True:
            current: Run | None = None
            source: SynchronousSource | AsynchronousSource | None = None
            try:
                if resume is not None:
                    lock.take(RunFolder.existing(resume).path)
                current = yield from begin()
                lock.take(current.folder.path)
                current.warnings[:0] = warnings
                current.stop_requested = stop
                source = AsynchronousSource(current) if recipe.loop.lag else SynchronousSource(current)
                yield from announce(current)
                stop.wait_for_safe_points()
                yield from train_steps(current, source)
                return (yield from finish_run(current))
            except Interrupted as stopped:
                if current is not None:
                    yield from leave_checkpoint(current)
                raise Interrupted(stop.number or stopped.number) from None
            except WorkersLost as lost:
                began, step = (current.folder.path, current.history.step) if current else (resume, 0)
                try:
                    folder, warning = restarts.grant(lost, began, step)
                except WorkersLost:
                    if current is not None:
                        yield from leave_checkpoint(current)
                    raise
                warnings = [*(current.warnings if current else warnings), warning]
                yield Warned(warning)
            except Exception as error:
                reason = as_sentence(error)
                if current is not None:
                    yield from leave_checkpoint(current)
                raise reason from None if reason is error else error
            finally:
                if source is not None:
                    source.close()
                if current is not None:
                    current.close()
            del current, source
            gc.collect()  # the lost run's policy, before another is loaded
            begin = partial(restart_run, folder, recipe)


# ---- beginning ----


def new_run(recipe: Recipe, folder: RunFolder | None = None) -> EventStream[Run]:
    """A new run (in a folder of its own, unless one is given): policy after its cold start, drafter made."""
    torch.manual_seed(recipe.seed)
    data = yield from prepare_data(recipe)  # bad data is found before the model is loaded
    data.task.problems("train")
    if recipe.eval.prompts:
        data.task.problems("eval")
    policy = yield from open_policy(recipe)  # both before there is a folder
    folder = folder or RunFolder.create(recipe.runs, recipe.name)
    folder.write_config(recipe.to_yaml())
    yield from warm_up(policy, recipe, data.task, folder.path)
    drafter = yield from prepare_drafter(recipe, policy, data.task, folder.path / "drafter")
    return Run(recipe, folder, policy, drafter, History(), data)


def resume_run(run_folder: Path, recipe: Recipe) -> EventStream[Run]:
    """A run as its newest usable checkpoint left it. Raises UserError when none can be used."""
    folder = RunFolder.open(run_folder)
    (current, note), passed_over = from_newest(folder.path, lambda found: load_checkpoint(found, folder, recipe))
    for warning in passed_over:
        yield Warned(warning)
    current.warnings += passed_over
    folder.write_config(recipe.to_yaml())  # with what was changed for the resume
    yield Note(note)
    return current


def restart_run(run_folder: Path, recipe: Recipe) -> EventStream[Run]:
    """The same, or the run from its beginning where it had no checkpoint yet."""
    if complete_checkpoints(run_folder / "checkpoints"):
        return (yield from resume_run(run_folder, recipe))
    folder = RunFolder.open(run_folder)
    folder.truncate_after(-1)
    return (yield from new_run(recipe, folder))


def load_checkpoint(checkpoint: Path, folder: RunFolder, recipe: Recipe) -> tuple[Run, str]:
    """The run, and what to say of it. Raises BrokenCheckpoint; UserError when made with another `train.lora`."""
    drafter = None
    saved = policy_folder(checkpoint, recipe.train.lora)
    with reading(checkpoint):
        history = History.from_json(read_history(checkpoint))
        policy = load_policy(str(saved), recipe.policy.dtype, recipe.policy.device)
        if recipe.speculation.tokens:
            speculation = recipe.speculation.model_copy(update={"draft": str(checkpoint / "drafter")})
            drafter = load_drafter(policy, speculation)
    dropped = folder.truncate_after(history.step)
    current = Run(recipe, folder, policy, drafter, history, load_data(recipe, policy))
    try:
        restore(checkpoint, current.learner, current.cotrainer)
        current.updates_recorded = current.learner.updates
    except BaseException:
        current.close()
        raise
    return current, f"resuming {folder.path} after step {history.step} ({dropped} newer log lines dropped)"


# ---- to the end ----


def announce(current: Run) -> EventStream[None]:
    """Start the trackers; the adapter and the predicted step as notes."""
    recipe = current.recipe
    current.env = current.folder.write_env()
    info = RunInfo(current.folder.path, recipe.name, recipe.model_dump(mode="json"), current.env, current.history.step)
    for tracker in current.trackers:
        tracker.start(info)
    if current.learner.adapter is not None:
        yield Note(current.learner.adapter.describe())
    try:
        current.prediction = predict(current)
        said = current.prediction.text()
    except UserError as error:
        said = f"This run is not predicted. {error}"
    yield Note(said)


def predict(current: Run) -> Prediction:
    """The mean step as the simulator sees it beforehand. Raises UserError where it cannot."""
    device = current.policy.device
    recipe = current.recipe.model_dump()
    if (trained := current.folder.path / "drafter").is_dir():
        recipe["speculation"]["draft"] = str(trained)  # made for this run: its config.json holds its acceptance
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return predict_recipe(recipe, device=name, shape=current.policy.model.config.to_dict())


def finish_run(current: Run) -> EventStream[dict[str, Any]]:
    """Save policy and drafter in Hugging Face format, write summary and report."""
    folder = current.folder
    exported = yield from as_stage("saving", _export(current))
    current.history.wall_s = current.wall_s
    for text in current.take_warnings():
        yield Warned(text)
    summary = current.history.summary() | run_facts(current) | {"machine": machine_line(current.env)}
    summary["paths"] = {name: str(getattr(folder, name)) for name in PATHS} | exported
    summary["overlap"] = overlap(current.history.lines)
    if current.prediction is not None:
        compared = compare(current.prediction, current.history.lines)
        summary["prediction"] = {**current.prediction.to_dict(), "compared": compared}
        yield Note(compared["text"])
    folder.write_summary(summary)
    for tracker in current.trackers:
        tracker.finish(summary)
    for text in current.take_warnings():  # of the trackers
        yield Warned(text)
    current.timeline.close()
    write_report(folder.path)
    yield Finished(summary)
    return summary


def run_facts(current: Run) -> dict[str, Any]:
    """The facts of a summary that are not in the history."""
    recipe = current.recipe
    step = current.history.step
    sums = pack_weights(step, current.policy, current.drafter).checksums
    return {
        "run": str(current.folder.path),
        "recipe": recipe.name,
        "seed": recipe.seed,
        "k": recipe.speculation.tokens,
        "speculation": recipe.speculation.model_dump(),
        "in_force": {"engine": recipe.rollout.engine, "rule": current.engine.rule},
        "weights": {"version": step, **{f"{group}_checksum": value for group, value in sums.items()}},
        "warnings": current.warnings,
    }


def _export(current: Run) -> EventStream[dict[str, str]]:
    yield from ()
    return export(current.folder, current.recipe, current.policy, current.drafter, current.learner.adapter)
