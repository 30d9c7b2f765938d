"""The training loop. A step is the five stages that 2604.26779 times:

    data        prompts
    prepare     weights of one version, policy and drafter together, to the engine
    generation  engine: draft, verify, accept until every sequence is done; rewards
    logprob     log-probabilities of the same tokens by the policy itself (and the reference)
    train       advantages, policy loss, drafter loss, update

Synchronous and asynchronous runs differ in their `source` of rollouts alone (`rollout.py`, `prefetch.py`). Everything
here yields events (`forerun.events`); `run.py` builds a run, resumes it and writes what it leaves behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from forerun.errors import Interrupted
from forerun.events import EventStream, Note, StepDone, Warned, as_stage, finish, to_its_end, with_progress
from forerun.learner.objective import Scored, mismatch_by_version
from forerun.tracking.metrics import without_non_finite
from forerun.training.metrics import comparison, evaluation, rollout_metrics, rollout_samples, thinned
from forerun.training.prompts import Request, encode, sampling_for
from forerun.training.rollout import RolloutBatch, Source, generate
from forerun.training.timing import StageClock
from forerun.training.weights import pack_weights

if TYPE_CHECKING:
    from forerun.training.state import Run

EVAL_STREAM = 1_000_003  # random stream of evaluations, apart from those of the steps


def train_steps(run: Run, source: Source) -> EventStream[None]:
    """All remaining steps of a run, with evaluations and checkpoints where the recipe wants them.

    Raises:
        Interrupted: a stop was requested; the policy is that of the last finished step.
        WorkersLost: a worker is gone. UserError: something of the user's is wrong.
    """
    recipe, history = run.recipe, run.history
    if history.step == 0 and not history.evaluations:
        yield from evaluate(run, 0)
    source.start(history.step)
    for step in range(history.step, recipe.train.steps):  # 0-based
        clock = StageClock(run.timeline, step + 1)
        batch = yield from source.next(step, clock)
        yield from compare(run, step, batch)
        scored, gaps = yield from clock.time_stage("logprob", score(run, step, batch, source))
        yield from to_its_end(learn(run, step, clock, batch, scored, gaps, source))
        if history.step == recipe.train.steps or due(recipe.eval.every, history.step):
            yield from evaluate(run, history.step)  # before the checkpoint, which must know of it
        if due(recipe.checkpoint.every, history.step):
            yield from run.checkpoint()
        if run.stop_requested():
            raise Interrupted
    if history.step and history.evaluations and history.evaluations[-1]["step"] != history.step:
        yield from evaluate(run, history.step)


def learn(
    run: Run,
    step: int,
    clock: StageClock,
    batch: RolloutBatch,
    scored: Scored,
    gaps: dict[str, float | None],
    source: Source,
) -> EventStream[None]:
    """Update the policy, publish the new version and write the step down. Only a failure of its own breaks it off."""
    advantages = run.algorithm.advantages(batch.rewards, run.recipe.train).view(-1)
    metrics = yield from clock.time_stage("train", update(run, step, batch, scored, advantages))
    yield from source.publish(step + 1, clock)
    metrics |= gaps | clock.metrics() | source.metrics(step, batch, clock)
    yield from record(run, step, clock, batch, metrics, advantages)


def score(
    run: Run, step: int, batch: RolloutBatch, source: Source
) -> EventStream[tuple[Scored, dict[str, float | None]]]:
    """Log-probabilities by the policy itself, and how far the engine's are from them.

    A co-trained drafter reads the same forward.
    """
    probe = source.probe(step)
    probed = finish(run.learner.score(probe)) if probe else None
    if run.cotrainer is not None:
        run.cotrainer.begin(step)
    scored = yield from with_progress(run.score(batch.rollouts), len(batch.rollouts))
    return scored, mismatch_by_version(batch.rollouts, scored, step, probe, probed)


def update(
    run: Run, step: int, batch: RolloutBatch, scored: Scored, advantages: Tensor
) -> EventStream[dict[str, float | None]]:
    """The policy's update, then the drafter's. `advantages` [P·n]. Returns metrics."""
    config = run.recipe.train
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    work = run.learner.update(batch.rollouts, advantages, scored, rate, run.stop_requested)
    metrics: dict[str, float | None] = {**(yield from with_progress(work, len(batch.rollouts)))}
    if run.cotrainer is not None:
        metrics |= run.cotrainer.update(step, batch.rollouts, scored.entropies)
    return metrics


def record(
    run: Run, step: int, clock: StageClock, batch: RolloutBatch, metrics: dict[str, float | None], advantages: Tensor
) -> EventStream[None]:
    """Write the step's metrics and samples down. From here on it counts as finished.

    Raises UserError when it must be the last, see `Alarms`.
    """
    line = rollout_metrics(batch) | metrics
    line |= {f"replicas/{name}": float(n) for name, n in run.engine.metrics().get("replicas", {}).items()}
    comparisons = run.history.comparisons
    if comparisons and comparisons[-1]["step"] == step + 1:
        line |= {f"compare/{key}": value for key, value in comparisons[-1].items() if key != "step"}
    run.alarms.observe(step + 1, line, run.learner.objective)
    line = without_non_finite(line)
    run.log(step + 1, line)
    run.folder.log_rollouts(rollout_samples(step + 1, batch, advantages, run.policy))
    run.history.add_step(clock.seconds, batch.counters, line)
    run.timeline.flush()
    run.updates_recorded = run.learner.updates
    yield StepDone(step + 1, line)
    for text in run.take_warnings():
        yield Warned(text)
    run.alarms.check()


def compare(run: Run, step: int, speculative: RolloutBatch) -> EventStream[None]:
    """Generate the same prompts without speculation, in `compare.steps` steps of a run, outside of its stages."""
    if run.drafter is None or step not in spread(run.recipe.compare.steps, run.recipe.train.steps):
        return
    with run.timeline.learner_span("compare", step + 1):
        run.plain.load(pack_weights(step, run.policy, None, shared=run.engine.shares_weights))
        work = generate(run.plain, run.policy, run.rewards, speculative.request, run.recipe.train.samples_per_prompt)
        plain = yield from as_stage("plain generation, to compare", work)
    run.history.comparisons.append(comparison(step + 1, plain, speculative))
    run.history.timeline = {"speculative": thinned(speculative.timeline), "plain": thinned(plain.timeline)}


def evaluate(run: Run, step: int) -> EventStream[None]:
    """Reward on the held-out prompts by the policy after `step` steps."""
    if not run.held_out:
        return
    recipe = run.recipe
    drafter = run.drafter if run.evaluator is run.engine else None
    prompts = [encode(problem, recipe, run.policy) for problem in run.held_out]
    request = Request(run.held_out, prompts, sampling_for(recipe, EVAL_STREAM, step, recipe.eval.temperature))
    with run.evaluator_in_use, run.timeline.learner_span("evaluation", step):
        run.evaluator.load(pack_weights(step, run.policy, drafter, shared=run.engine.shares_weights))
        run.engine_states.begin("evaluate", step)
        work = generate(run.evaluator, run.policy, run.rewards, request, recipe.eval.samples, run.stop_requested)
        batch = yield from as_stage("evaluation", work)
        run.engine_states.end(batch.timeline)
    result = evaluation(batch)
    run.log(step, dict(result))
    run.history.evaluations.append({"step": step, **result})
    yield Note(
        f"evaluation after step {step}: reward {result['eval/reward']:.3f} ± {result['eval/stderr']:.3f} "
        f"on {len(run.held_out)} held-out prompts, {result['time/eval']:.1f} s"
    )


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def spread(count: int, steps: int) -> set[int]:
    """`count` step numbers (0-based) spread evenly over `steps`, the first and the last among them."""
    if count <= 1 or steps <= 1:
        return {0} if count and steps else set()
    count = min(count, steps)
    return {round(i * (steps - 1) / (count - 1)) for i in range(count)}
