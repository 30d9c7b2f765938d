"""What a run needs before its first step: the policy (after its cold start), the drafter, the prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from forerun.config import Recipe
from forerun.draft import TRAINED, Drafter, load_drafter
from forerun.draft.distill import distill, pruned_copy
from forerun.draft.eagle3 import Eagle3Drafter
from forerun.draft.model import ModelDrafter
from forerun.draft.mtp import MtpDrafter, MtpHead
from forerun.draft.training import Validation, new_head, train_head
from forerun.engine import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.models import Policy, load_policy
from forerun.records import Prompt
from forerun.report.console import Console
from forerun.tasks import Problem, Task

Pairs = list[tuple[list[int], list[int]]]  # (prompt ids, completion ids)
TrainReport = Callable[[int, int, float], None]
ValidationReport = Callable[[int, Validation], None]


def prepare_policy(recipe: Recipe, task: Task, folder: Path, console: Console) -> Policy:
    """Load the policy; run its cold start where the recipe has one, keeping the adapter in `folder/cold_start`."""
    settings = recipe.policy
    with console.stage("loading the policy"):
        policy = load_policy(settings.model, settings.dtype, settings.device, settings.adapter)
    if recipe.cold_start is not None:
        _cold_start(policy, recipe, task, folder / "cold_start", console)
    return policy


def _cold_start(policy: Policy, recipe: Recipe, task: Task, folder: Path, console: Console) -> None:
    from forerun.learner.cold_start import cold_start, merge, solved_examples

    assert recipe.cold_start is not None
    steps = recipe.cold_start.steps
    problems, share = task.problems("train"), recipe.cold_start.answer_only
    examples = solved_examples(policy, problems, recipe.policy.chat, recipe.policy.system, share)
    losses: list[float] = []
    started = time.perf_counter()

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        console.progress(step + 1, steps, "steps", (step + 1) / (time.perf_counter() - started))

    with console.stage("cold start"):
        adapter = cold_start(policy, examples, recipe.cold_start, recipe.seed, report)
        merge(policy, adapter, folder)
    console.note(
        f"cold start: {steps} steps on {len(examples)} worked solutions, loss {losses[0]:.3f} -> {losses[-1]:.3f} "
        f"nats per token, {time.perf_counter() - started:.0f} s; adapter in {folder}"
    )


def prepare_drafter(recipe: Recipe, policy: Policy, task: Task, folder: Path, console: Console) -> Drafter | None:
    """Load the recipe's drafter, or train one on the policy's own rollouts where it names none."""
    speculation = recipe.speculation
    if speculation.tokens == 0:
        return None
    if speculation.draft is None and speculation.method in TRAINED:
        train_drafter(recipe, policy, task, folder, console)
        speculation = speculation.model_copy(update={"draft": str(folder)})
    return load_drafter(policy, speculation)


def train_drafter(recipe: Recipe, policy: Policy, task: Task, folder: Path, console: Console) -> dict[str, object]:
    """Sample the policy on the recipe's prompts, train a drafter on what it says, save it to `folder`.

    Returns:
        What is also written into the drafter's config.json under "forerun": data, settings and acceptance.
    """
    if recipe.speculation.method not in TRAINED:
        raise UserError("The recipe has no drafter to train: set speculation.method, e.g. speculation.method=eagle3")
    pairs = sample_policy(recipe, policy, task, recipe.draft.rollouts, console)
    started = time.perf_counter()

    def report(step: int, steps: int, loss: float) -> None:
        console.progress(step, steps, "steps", step / (time.perf_counter() - started))

    def validated(epoch: int, result: Validation) -> None:
        console.note(f"drafter: epoch {epoch}/{recipe.draft.epochs}: {result}")

    with console.stage("training the drafter"):
        train = {"model": _distilled, "mtp": _mtp_head}.get(recipe.speculation.method, _eagle3_head)
        drafter, best = train(recipe, policy, pairs, report, validated)
    about: dict[str, object] = {
        "policy": policy.name,
        "adapter": recipe.policy.adapter,
        "rollouts": len(pairs),
        "tokens": sum(len(c) for _, c in pairs),
        "temperature": recipe.rollout.temperature,
        "training": recipe.draft.model_dump(mode="json"),
        "acceptance_per_position": [round(a, 4) for a in best.per_position],
        "tokens_per_round": round(best.length, 4),
    }
    drafter.save(folder, about)
    return about


def _eagle3_head(
    recipe: Recipe, policy: Policy, pairs: Pairs, report: TrainReport, validated: ValidationReport
) -> tuple[Drafter, Validation]:
    head = new_head(policy, pairs, recipe.draft)
    best = train_head(head, policy, pairs, recipe.draft, recipe.rollout.temperature, recipe.seed, report, validated)
    return Eagle3Drafter(head.to(policy.dtype), policy), best


def _mtp_head(
    recipe: Recipe, policy: Policy, pairs: Pairs, report: TrainReport, validated: ValidationReport
) -> tuple[Drafter, Validation]:
    head = MtpHead(policy, recipe.draft.mtp_layers)
    best = train_head(head, policy, pairs, recipe.draft, recipe.rollout.temperature, recipe.seed, report, validated)
    return MtpDrafter(head.to(policy.dtype), policy), best


def _distilled(
    recipe: Recipe, policy: Policy, pairs: Pairs, report: TrainReport, validated: ValidationReport
) -> tuple[Drafter, Validation]:
    """A copy of the policy with fewer layers: those that the recipe names, else the first two and the last two."""
    count = policy.model.config.get_text_config().num_hidden_layers
    layers = recipe.draft.layers or sorted({0, 1, count - 2, count - 1} & set(range(count)))
    model = pruned_copy(policy, layers)
    best = distill(model, policy, pairs, recipe.draft, recipe.rollout.temperature, recipe.seed, report, validated)
    return ModelDrafter(Policy(model.to(policy.dtype), policy.tokenizer, f"{policy.name}, pruned"), policy), best


def sample_policy(
    recipe: Recipe, policy: Policy, task: Task, count: int, console: Console
) -> list[tuple[list[int], list[int]]]:
    """`count` plain samples on training prompts, at the recipe's temperature: (prompt ids, completion ids)."""
    n = recipe.train.samples_per_prompt
    problems = task.problems("train")
    chosen = random.Random(recipe.seed + 1).sample(problems, min(len(problems), -(-count // n)))
    prompts = [encode(p, recipe, policy).token_ids for p in chosen]
    engine = LocalEngine(policy, slots=recipe.rollout.slots)
    sampling = Sampling(
        recipe.rollout.max_new_tokens, recipe.rollout.temperature, recipe.seed + 1, tuple(recipe.rollout.stop)
    )
    pairs: list[tuple[list[int], list[int]]] = []
    started = time.perf_counter()
    with console.stage("sampling the policy"):
        for rollout in engine.stream(prompts, sampling, n):
            pairs.append((rollout.prompt_ids, rollout.tokens))
            console.progress(len(pairs), len(prompts) * n, "rollouts", len(pairs) / (time.perf_counter() - started))
    return pairs


def encode(problem: Problem, recipe: Recipe, policy: Policy) -> Prompt:
    """A problem as the engine takes it.

    Raises:
        UserError: the model has no chat template, or the prompt leaves no room in its context.
    """
    ids = policy.encode(problem.question, recipe.policy.chat, recipe.policy.system)
    if len(ids) >= policy.context:
        raise UserError(
            f"The prompt of problem '{problem.id}' has {len(ids)} tokens and the model's context is {policy.context}; "
            "shorten it or take it out of the data"
        )
    return Prompt(ids, problem.id, problem.answer)


def prompts_of_step(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of a step (0-based): every epoch is its own shuffle, and a step depends on its number alone."""
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, len(problems))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(problems)), len(problems))
        chosen.append(problems[order[index]])
    return chosen
