"""The one loop, synchronous or with generation running ahead. A step is the five stages that the paper times:

    data        prompts
    prepare     weights (policy and drafter, one version) -> engine
    generation  engine: draft, verify, accept until done; rewards
    logprob     the same tokens' log-probabilities by the policy itself (and the reference)
    train       advantages, policy loss, update -> weights of the next version

With `loop.lag` the rollouts come from `prefetch.py`: the generation stage is what the learner waits for them (exposed
generation), and a version is published as soon as it is learnt.
Evaluation, comparison with plain generation and checkpoints stand between steps and are timed on their own.
"""

from __future__ import annotations

import gc
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from forerun.algorithms.advantages import group_advantages
from forerun.config import Recipe, load_recipe
from forerun.drafters import Drafter, load_drafter
from forerun.engine import RolloutEngine, Sampling, Weights, around, rule_in_force, shares_weights
from forerun.engine.base import nothing
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import request_seed
from forerun.errors import Interrupted, UserError
from forerun.learner.cotrain_distributed import beside
from forerun.learner.distributed import make_learner
from forerun.learner.learner import mismatch
from forerun.models import Policy, load_policy
from forerun.report.console import Console
from forerun.report.html import write_report
from forerun.report.summary import overlap
from forerun.simulate.plan.predict import Prediction, compare, predict_recipe
from forerun.tasks import Problem, load_task
from forerun.tracking.environment import machine_line
from forerun.tracking.run_folder import RunFolder
from forerun.tracking.timeline import LEARNER, QUEUE, Timeline
from forerun.training.checkpoint import (
    complete_checkpoints,
    from_newest,
    policy_folder,
    read_history,
    reading,
    restore,
    save_checkpoint,
)
from forerun.training.drafter import prepare_drafter
from forerun.training.history import History
from forerun.training.interrupt import stop_flag
from forerun.training.prefetch import RolloutsAhead, lag_of
from forerun.training.restart import LOST, Restarts
from forerun.training.rollout import Generated, comparison, evaluation, generate, rollout_metrics
from forerun.training.setup import encode, prepare_policy, prompts_of_step
from forerun.training.timing import StageTimer, WatchedEngine
from forerun.training.weights import export, publish
from forerun.types import STAGES, Progress, Prompt, T
from forerun.workers.ray import starter
from forerun.workers.ray_ranks import launcher

EVAL_SEED, COMPARE_SEED = 1_000_003, 2_000_003  # streams of requests apart from training's
SAMPLES_KEPT = 16  # rollouts of a step that go into rollouts.jsonl


def run(recipe: Recipe, console: Console | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Train; returns the summary that is also written to the run folder.

    When a part of the run is lost, it goes back to its newest checkpoint, see `restart.py`.

    Args:
        resume: run folder whose newest checkpoint to continue; the recipe is that run's own.

    Raises:
        UserError: something of the user's is wrong. Interrupted: Ctrl-C; a checkpoint was written.
    """
    own_console = console or Console(recipe.train.steps)
    restarts = Restarts(recipe.checkpoint.restarts, own_console.warn)
    begin = partial(Training.resumed, resume) if resume else Training.fresh
    with own_console, stop_flag() as stop_requested:
        while True:
            training = None
            try:
                training = begin(recipe, own_console)
                return training.run(stop_requested)
            except LOST as lost:
                folder = restarts.grant(lost, training.folder.path if training else resume)
            finally:
                if training is not None:
                    training.close()
            del training
            gc.collect()  # the lost run's policy, before another is loaded
            begin = partial(Training.again, folder)


def resumed_recipe(folder: Path, overrides: dict[str, Any]) -> Recipe:
    """The recipe of an earlier run, with overrides (to train longer, say)."""
    return load_recipe(str(RunFolder.open(folder).config), overrides)


@dataclass(frozen=True, slots=True)
class Request:
    """A step's problems, their prompts, and how to sample."""

    problems: list[Problem]
    prompts: list[Prompt]
    sampling: Sampling


class Training:
    """A run between its first and its last step."""

    def __init__(
        self,
        recipe: Recipe,
        console: Console,
        folder: RunFolder,
        policy: Policy,
        drafter: Drafter | None,
        history: History,
    ) -> None:
        self.recipe, self.console, self.folder = recipe, console, folder
        self.policy, self.drafter, self.history = policy, drafter, history
        self.task = load_task(recipe.task, recipe.seed)
        self.problems = self.task.problems("train")
        self.held_out = self.task.problems("eval")[: recipe.eval.prompts] if recipe.eval.prompts else []
        speculation, eval_slots = recipe.speculation, recipe.eval.slots
        engine = around(recipe.rollout, policy, drafter, speculation, starter(recipe))
        self.timeline = Timeline(folder.timeline, history.wall_s, history.step)
        self.watched = WatchedEngine(engine, self.timeline)
        self.engine = self.watched.engine
        apart = eval_slots is not None or recipe.loop.lag > 0  # an engine that runs ahead has no time for it
        self.evaluator = LocalEngine(policy, slots=eval_slots or recipe.rollout.slots) if apart else self.engine
        self.ahead: RolloutsAhead | None = None
        try:
            ranks = launcher(recipe, folder.path)
            self.learner = make_learner(policy, recipe.train, recipe.rollout.temperature, ranks)
            self.cotrainer, self.score = beside(self.learner, policy, drafter, recipe)
        except BaseException:
            self.engine.close()  # what a run that goes back will need
            raise
        if self.learner.adapter is not None:
            console.note(self.learner.adapter.describe())
        self._started = time.perf_counter() - history.wall_s
        self._env: dict[str, Any] = {}
        self._prediction: Prediction | None = None

    @classmethod
    def fresh(cls, recipe: Recipe, console: Console, folder: RunFolder | None = None) -> Training:
        """A new run (in a folder of its own, unless one is given), policy after its cold start, drafter made."""
        torch.manual_seed(recipe.seed)
        task = load_task(recipe.task, recipe.seed)
        task.problems("train")  # bad data is told before the model is loaded
        folder = folder or RunFolder.create(recipe.runs, recipe.name)
        folder.write_config(recipe.to_yaml())
        policy = prepare_policy(recipe, task, folder.path, console)
        drafter = prepare_drafter(recipe, policy, task, folder.path / "drafter", console)
        return cls(recipe, console, folder, policy, drafter, History())

    @classmethod
    def resumed(cls, run_folder: Path, recipe: Recipe, console: Console) -> Training:
        """A run as its newest checkpoint that can be used left it. Raises UserError when none can."""
        folder = RunFolder.open(run_folder)
        return from_newest(folder.path, lambda found: cls._from(found, folder, recipe, console), console.warn)

    @classmethod
    def again(cls, run_folder: Path, recipe: Recipe, console: Console) -> Training:
        """The same, or the run from its beginning where it had no checkpoint yet."""
        if complete_checkpoints(run_folder / "checkpoints"):
            return cls.resumed(run_folder, recipe, console)
        folder = RunFolder.open(run_folder)
        folder.truncate_after(-1)
        return cls.fresh(recipe, console, folder)

    @classmethod
    def _from(cls, checkpoint: Path, folder: RunFolder, recipe: Recipe, console: Console) -> Training:
        """Raises BrokenCheckpoint; UserError where it was made with another `train.lora`."""
        drafter, saved = None, policy_folder(checkpoint, recipe.train.lora)
        with reading(checkpoint):
            history = History.from_json(read_history(checkpoint))
            policy = load_policy(str(saved), recipe.policy.dtype, recipe.policy.device)
            if recipe.speculation.tokens:
                speculation = recipe.speculation.model_copy(update={"draft": str(checkpoint / "drafter")})
                drafter = load_drafter(policy, speculation)
        dropped = folder.truncate_after(history.step)
        console.note(f"resuming {folder.path} after step {history.step} ({dropped} newer log lines dropped)")
        training = cls(recipe, console, folder, policy, drafter, history)
        try:
            restore(checkpoint, training.learner, training.cotrainer)
        except BaseException:
            training.close()
            raise
        return training

    def run(self, stop_requested: Callable[[], bool]) -> dict[str, Any]:
        """All remaining steps, then the model, the summary and the report."""
        recipe, history = self.recipe, self.history
        self._env = self.folder.write_env()
        self._prediction = self._predict()
        try:
            if history.step == 0 and not history.evaluations:
                self._evaluate(0, stop_requested)
            self._run_ahead()
            while history.step < recipe.train.steps:
                self._step(history.step, stop_requested)
                last = history.step == recipe.train.steps
                if last or (recipe.eval.every and history.step % recipe.eval.every == 0):
                    self._evaluate(history.step, stop_requested)  # before the checkpoint, which must know of it
                if recipe.checkpoint.every and history.step % recipe.checkpoint.every == 0:
                    self._checkpoint()
                if stop_requested():
                    raise Interrupted
            if history.step and history.evaluations and history.evaluations[-1]["step"] != history.step:
                self._evaluate(history.step, stop_requested)
        except Interrupted:
            self._checkpoint()
            self.timeline.close()
            self.console.warn(
                f"stopped after step {history.step}; go on with: forerun train --resume {self.folder.path}"
            )
            raise
        return self._finish()

    def _run_ahead(self) -> None:
        """With lag: start to generate."""
        recipe, step = self.recipe, self.history.step
        if recipe.loop.lag == 0 or step >= recipe.train.steps:
            return
        steps, quiet = range(step, recipe.train.steps), Console(1, out=io.StringIO())

        def make(step: int, stop: Callable[[], bool], between: Callable[[], None]) -> Generated:
            return self._generate(step, self._request(step), quiet, stop, between)

        def told(step: int, waiting: int) -> None:
            self.timeline.count(QUEUE, waiting, step + 1)

        self.ahead = RolloutsAhead(self.engine, make, steps, recipe.loop.lag, recipe.loop.in_flight, told)
        self.ahead.publish(publish(step, self.policy, self.drafter, shared=False, frozen=True))

    def close(self) -> None:
        """Give the engines and the learner back."""
        if self.ahead is not None:
            self.ahead.close()
        self.engine.close()
        self.learner.close()
        if "plain" in vars(self):  # made when it was first asked for
            self.plain.close()

    def _predict(self) -> Prediction | None:
        """The mean step as the simulator sees it beforehand; what it does not know is told and no reason to stop."""
        device, recipe = self.policy.device, self.recipe.model_dump()
        if (trained := self.folder.path / "drafter").is_dir():
            recipe["speculation"]["draft"] = str(trained)  # made for this run: its config.json tells its acceptance
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        try:
            found = predict_recipe(recipe, device=name, shape=self.policy.model.config.to_dict())
        except UserError as error:
            self.console.note(f"no prediction of this run: {error}")
            return None
        self.console.note(found.text())
        return found

    def _step(self, step: int, stop_requested: Callable[[], bool]) -> None:
        """One step, 0-based; counted as finished only when its update has been made."""
        recipe, console, timer = self.recipe, self.console, StageTimer(self.timeline, step + 1)
        if self.ahead is None:
            with timer.stage("data"):
                request = self._request(step)
            with timer.stage("prepare"):
                self.engine.load(self._publish(step, self.drafter))
            with timer.stage("generation"), console.stage("generation"):
                generated = self._generate(step, request, console, stop_requested)
            self._compare(step, request, generated)
        else:
            with timer.stage("generation"), console.stage("waiting for rollouts"):
                generated = self.ahead.take(step, stop_requested)
        rows = len(generated.rollouts)
        with timer.stage("logprob"), console.stage("log-probabilities"):
            if self.cotrainer is not None:
                self.cotrainer.begin(step)
            scored = self._watch(self.score(generated.rollouts), rows)
        with timer.stage("train"), console.stage("training"):
            advantages = group_advantages(generated.rewards, recipe.train.normalize_std).view(-1)
            rate = recipe.train.learning_rate * min(1.0, (step + 1) / max(1, recipe.train.warmup))
            update = self.learner.update(generated.rollouts, advantages, scored, rate, stop_requested)
            metrics = self._watch(update, rows)
            if self.cotrainer is not None:
                metrics |= self.cotrainer.train(step, generated.rollouts, scored.entropies)
        if self.ahead is not None:
            with timer.stage("prepare"):
                self.ahead.publish(publish(step + 1, self.policy, self.drafter, shared=False, frozen=True))
        self._record(step, timer, generated, metrics | mismatch(generated.rollouts, scored), advantages)

    def _watch(self, work: Progress[T], rows: int) -> T:
        """Run work to its end, showing how many of the rollouts are done; its result."""
        while True:
            try:
                done = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            self.console.progress(done, rows, "rollouts")

    def _request(self, step: int) -> Request:
        """What a step asks the engine for."""
        recipe = self.recipe
        problems = prompts_of_step(self.problems, step, recipe.train.prompts_per_step, recipe.seed)
        prompts = [encode(p, recipe, self.policy) for p in problems]
        return Request(problems, prompts, self._sampling(request_seed(recipe.seed, step, 0)))

    def _generate(
        self, step: int, request: Request, console: Console, stop: Callable[[], bool],
        between: Callable[[], None] = nothing,
    ) -> Generated:  # fmt: skip
        n = self.recipe.train.samples_per_prompt
        self.watched.begin("generate", step + 1)
        return generate(
            self.engine, self.policy, self.task, request.problems, request.prompts, request.sampling, n, console, stop,
            between,
        )  # fmt: skip

    def _record(
        self, step: int, timer: StageTimer, generated: Generated, metrics: dict[str, float], advantages: torch.Tensor
    ) -> None:
        """Write the step's metrics and samples, and count it as done."""
        history, seconds = self.history, timer.seconds
        history.stages.append({s: seconds[s] for s in STAGES})
        history.counters = history.counters.plus(generated.counters)
        history.step = step + 1
        history.wall_s = time.perf_counter() - self._started
        total = sum(seconds.values())
        line = rollout_metrics(generated) | metrics | {f"time/{s}": seconds[s] for s in STAGES}
        line |= {"time/step": total, "time/exposed_generation": seconds["generation"]}
        line["time/engine_idle"] = idle_s = timer.engine_idle_s()
        if self.ahead is not None:
            line |= lag_of(generated, step) | {"async/steps_waiting": float(self.ahead.waiting)}
            line |= {"async/trainer_idle": seconds["generation"] / total, "async/engine_idle": idle_s / total}
        line |= {f"replicas/{name}": float(n) for name, n in self.engine.metrics().get("replicas", {}).items()}
        if history.comparisons and history.comparisons[-1]["step"] == step + 1:
            line |= {f"compare/{k}": v for k, v in history.comparisons[-1].items() if k != "step"}
        self.folder.log(step + 1, line)
        self.folder.log_rollouts(self._samples(step + 1, generated, advantages))
        self.timeline.flush()
        self.console.step(step + 1, line)
        while self.engine.warnings:
            self.console.warn(self.engine.warnings.pop(0))

    def _samples(self, step: int, generated: Generated, advantages: torch.Tensor) -> Iterator[dict[str, Any]]:
        decode = self.policy.tokenizer.decode
        rewards = generated.rewards.view(-1).tolist()
        for i, rollout in list(enumerate(generated.rollouts))[:SAMPLES_KEPT]:
            yield {
                "step": step,
                "prompt_id": f"{step}/{rollout.prompt_index}",
                "prompt": decode(rollout.prompt_ids),
                "text": generated.texts[i],
                "reward": rewards[i],
                "advantage": float(advantages[i]),
                "tokens": len(rollout.tokens),
                "finish_reason": rollout.finish_reason,
                "rounds": rollout.rounds,
                "accepted_mask": rollout.drafted,
                "token_texts": [decode([t]) for t in rollout.tokens],
            }

    @cached_property
    def plain(self) -> RolloutEngine:
        """The same engine without speculation."""
        return around(self.recipe.rollout, self.policy, None, self.recipe.speculation)

    def _publish(self, step: int, drafter: Drafter | None) -> Weights:
        return publish(step, self.policy, drafter, shared=shares_weights(self.recipe.rollout))

    def _compare(self, step: int, request: Request, speculative: Generated) -> None:
        """Generate the same prompts plainly too, in `compare.steps` steps spread over the run; in no stage's time."""
        if self.drafter is None or step not in spread(self.recipe.compare.steps, self.recipe.train.steps):
            return
        n = self.recipe.train.samples_per_prompt
        span = self.timeline.span(LEARNER, "compare", step + 1)
        with self.console.stage("plain generation, to compare"), span:
            self.plain.load(self._publish(step, None))
            plain = generate(
                self.plain, self.policy, self.task, request.problems, request.prompts, request.sampling, n, self.console
            )
        self.history.comparisons.append(comparison(step + 1, plain, speculative))
        self.history.timeline = {"speculative": _thin(speculative.timeline), "plain": _thin(plain.timeline)}

    def _evaluate(self, step: int, stop_requested: Callable[[], bool]) -> None:
        if not self.held_out:
            return
        recipe = self.recipe
        self.evaluator.load(self._publish(step, self.drafter if self.evaluator is self.engine else None))
        prompts = [encode(p, recipe, self.policy) for p in self.held_out]
        temperature = recipe.rollout.temperature if recipe.eval.temperature is None else recipe.eval.temperature
        sampling = self._sampling(request_seed(recipe.seed, EVAL_SEED, step), temperature)
        if self.evaluator is self.engine:
            self.watched.begin("evaluate", step)
        with self.console.stage("evaluation"), self.timeline.span(LEARNER, "evaluation", step):
            generated = generate(
                self.evaluator, self.policy, self.task, self.held_out, prompts, sampling, recipe.eval.samples,
                self.console, stop_requested,
            )  # fmt: skip
            result = evaluation(generated)
        self.folder.log(step, dict(result))
        self.history.evaluations.append({"step": step, **result})
        self.console.note(
            f"evaluation after step {step}: reward {result['eval/reward']:.3f} ± {result['eval/stderr']:.3f} "
            f"on {len(self.held_out)} held-out prompts, {result['time/eval']:.1f} s"
        )

    def _sampling(self, seed: int, temperature: float | None = None) -> Sampling:
        rollout = self.recipe.rollout
        heat = rollout.temperature if temperature is None else temperature
        return Sampling(rollout.max_new_tokens, heat, seed, tuple(rollout.stop))

    def _checkpoint(self) -> None:
        with self.console.stage("checkpoint"), self.timeline.span(LEARNER, "checkpoint", self.history.step):
            self.history.wall_s = time.perf_counter() - self._started
            save_checkpoint(
                self.folder.path / "checkpoints", self.history.step, self.policy, self.learner, self.drafter,
                self.history.to_json(), self.recipe.checkpoint.keep, self.cotrainer,
            )  # fmt: skip
        self.timeline.flush()

    def _finish(self) -> dict[str, Any]:
        """Save the policy and the drafter in Hugging Face format, write summary and report, show the table."""
        folder, recipe = self.folder, self.recipe
        with self.console.stage("saving"):
            exported = export(folder, recipe, self.policy, self.drafter, self.learner.adapter)
        self.history.wall_s = time.perf_counter() - self._started
        paths = {
            name: str(getattr(folder, name))
            for name in ("metrics", "rollouts", "timeline", "config", "env", "summary", "report")
        }
        sums = publish(self.history.step, self.policy, self.drafter).checksums
        summary = self.history.summary() | {
            "run": str(folder.path),
            "recipe": recipe.name,
            "seed": recipe.seed,
            "k": recipe.speculation.tokens,
            "speculation": recipe.speculation.model_dump(),
            "in_force": {"engine": recipe.rollout.engine, "rule": rule_in_force(self.engine, recipe.speculation)},
            "weights": {"version": self.history.step, **{f"{g}_checksum": c for g, c in sums.items()}},
            "warnings": self.console.warnings,
            "paths": paths | exported,
            "machine": machine_line(self._env),
        }
        lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
        summary["overlap"] = overlap(lines)
        if self._prediction is not None:
            judged = compare(self._prediction, lines)
            summary["prediction"] = {**self._prediction.to_dict(), "compared": judged}
            self.console.note(judged["text"])
        folder.write_summary(summary)
        self.timeline.close()
        write_report(folder.path)
        self.console.table(summary)
        return summary


def spread(count: int, steps: int) -> set[int]:
    """`count` step numbers (0-based) spread evenly over `steps`, the first and the last among them."""
    if count <= 1 or steps <= 1:
        return {0} if count and steps else set()
    count = min(count, steps)
    return {round(i * (steps - 1) / (count - 1)) for i in range(count)}


def _thin(timeline: list[tuple[float, int]], points: int = 400) -> list[tuple[float, int]]:
    """At most about `points` points, the last one kept."""
    stride = max(1, len(timeline) // points)
    return [*timeline[::stride], timeline[-1]] if timeline else []
