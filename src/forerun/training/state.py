"""A run between its first and its last step: its policy, drafter, engine, learner, history and run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from threading import Lock
from time import perf_counter
from typing import Any

from forerun.algorithms import ALGORITHMS, Algorithm
from forerun.config import Recipe
from forerun.drafters import Drafter
from forerun.engine import RolloutEngine, build_engine
from forerun.engine.local.engine import LocalEngine
from forerun.events import EventStream, as_stage
from forerun.learner.cotrain_distributed import build_cotrainer
from forerun.learner.distributed import make_learner
from forerun.models import Policy
from forerun.simulate.plan.predict import Prediction
from forerun.tasks.workers import RewardWorkers
from forerun.tracking.metrics import without_non_finite
from forerun.tracking.run_folder import RunFolder
from forerun.tracking.timeline import Timeline
from forerun.tracking.trackers import load_trackers
from forerun.training.alarms import Alarms
from forerun.training.checkpoint import save_checkpoint
from forerun.training.data import Data
from forerun.training.history import History
from forerun.training.prompts import Request, request_of_step
from forerun.training.timing import EngineStates
from forerun.training.weights import pack_weights
from forerun.types import Weights
from forerun.workers.ray import ray_launcher


class Run:
    """The parts of a run between its first and its last step."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, policy: Policy, drafter: Drafter | None, history: History, data: Data
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.policy = policy
        self.drafter = drafter
        self.history = history
        self.warnings: list[str] = [*data.warnings]
        self._new_warnings = list(policy.warnings)  # not yielded yet
        self.trackers = load_trackers(recipe.trackers, self._new_warnings.append)
        self.stop_requested: Callable[[], bool] = lambda: False
        self.alarms = Alarms(recipe)
        self.algorithm: Algorithm = ALGORITHMS.load(recipe.train.algorithm)
        self.task = data.task
        self.rewards = RewardWorkers(recipe.task, recipe.seed)
        self.problems = self.task.problems("train")
        self.held_out = self.task.problems("eval")[: recipe.eval.prompts] if recipe.eval.prompts else []
        self.timeline = Timeline(folder.timeline, history.wall_s, history.step)
        workers = (recipe.rollout.replicas, recipe.train.ranks)
        launcher = ray_launcher(recipe.cluster, "replica", *workers)
        self.engine = build_engine(recipe.rollout, policy, drafter, recipe.speculation, launcher, workers[1])
        self.engine_states = EngineStates(self.engine, self.timeline)
        self.engine_lock = Lock()  # of an asynchronous run, whose engine also evaluates
        self.evaluator = self._evaluator()
        self.evaluator_in_use = self.engine_lock if self.evaluator is self.engine else nullcontext()
        try:
            launcher = ray_launcher(recipe.cluster, "rank", *workers)
            self.learner = make_learner(policy, recipe.train, recipe.rollout, launcher, folder.path)
            self.cotrainer, self.score = build_cotrainer(
                self.learner, policy, drafter, recipe, self._new_warnings.append
            )
        except BaseException:
            self.engine.close()
            raise
        self.rewards.warm_up()
        self.env: dict[str, Any] = {}  # content of env.json
        self.prediction: Prediction | None = None
        self.updates_recorded = self.learner.updates  # optimizer steps of the finished steps
        self._started = perf_counter() - history.wall_s

    def request(self, step: int) -> Request:
        """What a step (0-based) asks the engine for."""
        return request_of_step(self.recipe, self.policy, self.problems, step)

    def weights(self, version: int) -> Weights:
        """Policy and drafter as they are, for the run's engine."""
        return pack_weights(version, self.policy, self.drafter, shared=self.engine.shares_weights)

    def frozen_weights(self, version: int) -> Weights:
        """A copy of them, for an engine that reads it during the next update."""
        return pack_weights(version, self.policy, self.drafter, shared=False, frozen=True)

    def checkpoint(self) -> EventStream[None]:
        """Write one of this moment. Raises UserError when the disk is full."""
        yield from as_stage("checkpoint", self._checkpoint())

    def _checkpoint(self) -> EventStream[None]:
        with self.timeline.learner_span("checkpoint", self.history.step):
            yield from ()
            self.history.wall_s = self.wall_s
            save_checkpoint(
                self.folder.path / "checkpoints",
                self.history.step,
                self.policy,
                self.learner,
                self.drafter,
                self.history.to_json(),
                self.recipe.checkpoint.keep,
                self.cotrainer,
            )
        self.timeline.flush()

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Write a line of metrics, to the run folder and to every tracker: null for one that is not finite."""
        self.alarms.observe_finite(step, metrics)
        metrics = without_non_finite(metrics)
        self.folder.log(step, metrics)
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def take_warnings(self) -> list[str]:
        """What engine, rewards, alarms and trackers have warned of since this was last asked; kept for the summary."""
        sources = (self.engine.warnings, self.rewards.warnings, self.alarms.warnings, self._new_warnings)
        found = [text for source in sources for text in source]
        for source in sources:
            source.clear()
        self.warnings += [text for text in found if text not in self.warnings]
        return found

    @property
    def wall_s(self) -> float:
        """Seconds of the run, those before a resume included."""
        return perf_counter() - self._started

    @cached_property
    def plain(self) -> RolloutEngine:
        """The same engine without speculation."""
        return build_engine(self.recipe.rollout, self.policy, None, self.recipe.speculation)

    def close(self) -> None:
        """Give the engines, the learner and the reward workers back."""
        self.rewards.close()
        self.engine.close()
        self.learner.close()
        if "plain" in vars(self):  # made when it was first asked for
            self.plain.close()

    def _evaluator(self) -> RolloutEngine:
        """The run's engine; of local engines another one on the live policy where evaluation has slots of its own, or
        where the run's generates ahead."""
        slots = self.recipe.eval.slots
        if self.recipe.rollout.engine != "local" or (slots is None and not self.recipe.loop.lag):
            return self.engine
        return LocalEngine(self.policy, slots=slots or self.recipe.rollout.slots)
