"""`forerun verify`: does this engine, with this speculation block, emit samples of the policy?

Five claims on the user's model, in the order of the functions below. Each reports what it measured, what it would have
detected, and whether it holds. How they test: parity.py, two_sample.py, distribution.py, weights.py.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from forerun.config import Recipe
from forerun.drafters import Drafter, load_drafter
from forerun.engine import RolloutEngine, Sampling, build_engine
from forerun.engine.local.engine import LocalEngine
from forerun.errors import UserError
from forerun.events import Began, Ended, EventStream, finish
from forerun.lossless.distribution import distribution_checks
from forerun.lossless.exact import disputed_contexts, float32_copy
from forerun.lossless.faults import break_engine, check_fault, tree_verifier_of, verifier_of
from forerun.lossless.parity import greedy_check, parity_checks
from forerun.lossless.two_sample import two_sample_checks
from forerun.lossless.verdict import Check, Claim, Kind, Verification
from forerun.lossless.weights import weight_checks
from forerun.models import Policy
from forerun.tasks import Task
from forerun.tasks.workers import RewardWorkers
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.data import prepare_data
from forerun.training.drafter import prepare_drafter
from forerun.training.prompts import Request, encode, prepare_policy
from forerun.training.rollout import RolloutBatch, generate
from forerun.training.weights import pack_weights

SEED, SEED_STRIDE = 77, 1000  # of recipe.seed 0, and from one recipe.seed to the next
MANY_SLOTS = 32  # for plain decoding and short texts: large batches are cheap, and change no distribution


@dataclass(frozen=True, slots=True)
class Effort:
    """Sample sizes."""

    prompts: int  # whole rollouts: of each engine, `samples` a prompt
    samples: int
    contexts: int  # distribution test: contexts, and texts from each
    texts: int
    greedy_prompts: int
    greedy_tokens: int
    greedy_prompts_float32: int
    parity: int  # rollouts whose log-probabilities are compared,
    parity_tokens: int  # over their first tokens


QUICK = Effort(12, 3, 4, 256, 8, 48, 4, 8, 64)
FULL = Effort(48, 16, 24, 2048, 64, 64, 64, 64, 4096)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is being verified."""

    recipe: Recipe
    policy: Policy
    drafter: Drafter
    task: Task
    rewards: RewardWorkers
    engine: RolloutEngine
    plain: LocalEngine  # the reference, whatever engine is verified: proven against the module's own forward
    inject: str | None

    @property
    def temperature(self) -> float:
        """Of the sampled claims: the recipe's, or 1 where it is greedy (greedy text has its own claim)."""
        return self.recipe.rollout.temperature or 1.0

    @property
    def seed(self) -> int:
        """Of all sampling here: another `seed=` of the recipe makes an independent verification."""
        return SEED + SEED_STRIDE * self.recipe.seed

    def rollouts(self, engine: RolloutEngine, effort: Effort, samples: int, seed: int) -> RolloutBatch:
        """`samples` whole rollouts of each prompt."""
        problems = self.task.problems("eval")[: effort.prompts]
        prompts = [encode(p, self.recipe, self.policy) for p in problems]
        sampling = Sampling(self.recipe.rollout.max_new_tokens, self.temperature, seed, tuple(self.recipe.rollout.stop))
        return finish(generate(engine, self.policy, self.rewards, Request(problems, prompts, sampling), samples))

    def prompts(self, count: int) -> list[list[int]]:
        """Token ids of held-out prompts."""
        return [encode(p, self.recipe, self.policy) for p in self.task.problems("eval")[:count]]


def verify_recipe(
    recipe: Recipe, *, effort: Effort = FULL, against: int | None = None, inject: str | None = None
) -> EventStream[Verification]:
    """Verify a recipe's policy, drafter, engine and speculation block.

    Args:
        effort: sample sizes; QUICK takes minutes on two cores for a model of 135M parameters.
        against: plain rollouts per prompt to compare the speculative ones with; None: as many as those.
        inject: a fault of faults.py; the verification must fail.

    Raises:
        UserError: the recipe does not speculate, or names something that cannot be loaded; or there is no such fault.
    """
    if inject is not None:
        check_fault(inject, recipe.rollout)
    if recipe.speculation.tokens == 0:
        raise UserError(
            f"The recipe '{recipe.name}' does not speculate (method {recipe.speculation.method}, k "
            f"{recipe.speculation.k}), so there is nothing to verify; try speculation.method=eagle3 speculation.k=3"
        )
    with tempfile.TemporaryDirectory() as scratch:
        subject = yield from _subject(recipe, inject, Path(scratch))
        try:
            claims = yield from _claims(subject, effort, against, Path(scratch))
            return Verification(_about(subject, effort), claims)
        finally:
            subject.rewards.close()
            subject.engine.close()


def _subject(recipe: Recipe, inject: str | None, scratch: Path) -> EventStream[Subject]:
    task = (yield from prepare_data(recipe)).task
    policy = yield from prepare_policy(recipe, task, scratch)
    drafter = yield from prepare_drafter(recipe, policy, task, scratch / "drafter")
    assert drafter is not None
    plain = _reference(recipe, policy)
    engine = _speculative(recipe, policy, drafter, inject)
    break_engine(engine, inject)
    return Subject(recipe, policy, drafter, task, RewardWorkers(recipe.task, recipe.seed), engine, plain, inject)


def _reference(recipe: Recipe, policy: Policy) -> LocalEngine:
    """Raises UserError when the local engine cannot prove that it computes this policy."""
    try:
        return LocalEngine(policy, slots=max(recipe.rollout.slots, MANY_SLOTS))
    except UserError as error:
        why = str(error).split("; use ")[0]
        raise UserError(f"forerun verify compares with the local engine, on any engine. {why}") from error


def _speculative(recipe: Recipe, policy: Policy, drafter: Drafter, inject: str | None, slots: int = 1) -> RolloutEngine:
    """The engine under test with at least that many slots. One with its own server is started once, with many."""
    speculation = recipe.speculation
    if recipe.rollout.engine != "local" or recipe.rollout.replicas:
        slots = max(recipe.rollout.slots, MANY_SLOTS)
        return build_engine(recipe.rollout.model_copy(update={"slots": slots}), policy, drafter, speculation)
    return LocalEngine(
        policy,
        drafter,
        k=speculation.tokens,
        rule=speculation.verify,
        slots=max(recipe.rollout.slots, slots),
        verifier=verifier_of(inject),
        tree_verifier=tree_verifier_of(inject if speculation.method == "graft" else None),
    )


def _claims(subject: Subject, effort: Effort, against: int | None, scratch: Path) -> EventStream[list[Claim]]:
    claims: list[Claim] = []
    made: dict[str, RolloutBatch] = {}
    tests: list[tuple[str, Kind, Callable[[], list[Check]]]] = [
        ("greedy identity", "numerical", lambda: _greedy(subject, effort, scratch)),
        ("two samples", "algorithmic", lambda: _two_samples(subject, effort, against or effort.samples, made)),
        ("joint law", "algorithmic", lambda: _distribution(subject, effort, made["plain"])),
        ("log-probabilities", "log-probability", lambda: _parity(subject, effort, made["speculative"])),
        ("weight versions", "contract", lambda: _weights(subject)),
    ]
    for name, kind, test in tests:
        started = time.perf_counter()
        yield Began(name)
        claims.append(Claim(name, kind, test(), time.perf_counter() - started))
        yield Ended(name)
    return claims


def _greedy(subject: Subject, effort: Effort, scratch: Path) -> list[Check]:
    """In the recipe's number format, and in float32 where that is another one."""
    recipe, tokens = subject.recipe, effort.greedy_tokens
    prompts = subject.prompts(effort.greedy_prompts)
    check = greedy_check(subject.plain, subject.engine, subject.policy, prompts, tokens)
    if subject.policy.dtype == torch.float32:
        return [check]
    exact = float32_copy(subject.policy)
    subject.drafter.save(scratch / "float32", {})
    drafter = load_drafter(exact, recipe.speculation.model_copy(update={"draft": str(scratch / "float32")}))
    assert drafter is not None
    plain = _reference(recipe, exact)
    with closing(_speculative(recipe, exact, drafter, subject.inject)) as engine:
        return [check, greedy_check(plain, engine, exact, prompts[: effort.greedy_prompts_float32], tokens)]


def _two_samples(subject: Subject, effort: Effort, against: int, made: dict[str, RolloutBatch]) -> list[Check]:
    """Keeps the rollouts in `made` for later claims."""
    made["plain"] = subject.rollouts(subject.plain, effort, against, subject.seed)
    made["speculative"] = subject.rollouts(subject.engine, effort, effort.samples, subject.seed + 1)
    rewards = [float(x) for g in (made["plain"], made["speculative"]) for x in g.rewards.flatten()]
    return two_sample_checks(made["plain"].rollouts, made["speculative"].rollouts, rewards, subject.seed)


def _distribution(subject: Subject, effort: Effort, plain: RolloutBatch) -> list[Check]:
    """On thousands of texts long enough for a whole round of k drafts and the token after it."""
    contexts = disputed_contexts(subject.policy, subject.drafter, plain.rollouts, effort.contexts, subject.temperature)
    length = max(3, subject.recipe.speculation.tokens + 2)
    sampling = Sampling(length, subject.temperature, subject.seed + 2)
    engine = subject.engine
    if isinstance(engine, LocalEngine):
        engine = _speculative(subject.recipe, subject.policy, subject.drafter, subject.inject, MANY_SLOTS)
    asked: Drafter | None = subject.drafter
    if not subject.drafter.state_dict():  # one that learns online must not be asked about texts that it has seen
        asked = load_drafter(subject.policy, subject.recipe.speculation)
    assert asked is not None
    return distribution_checks(engine, subject.policy, asked, contexts, effort.texts, length, sampling)


def _parity(subject: Subject, effort: Effort, speculative: RolloutBatch) -> list[Check]:
    k, slots = subject.recipe.speculation.tokens, subject.recipe.rollout.slots
    stride = max(1, len(speculative.rollouts) // effort.parity)
    some, most = speculative.rollouts[::stride][: effort.parity], effort.parity_tokens
    some = [replace(r, tokens=r.tokens[:most], logprobs=r.logprobs[:most]) for r in some]
    return parity_checks(subject.policy, some, k, slots, subject.temperature)


def _weights(subject: Subject) -> list[Check]:
    def weights(version: int) -> Any:
        return pack_weights(version, subject.policy, subject.drafter, shared=subject.engine.shares_weights)

    return weight_checks(subject.engine, subject.drafter, weights, subject.prompts(4))


def _about(subject: Subject, effort: Effort) -> dict[str, Any]:
    recipe, speculation = subject.recipe, subject.recipe.speculation
    rule = subject.engine.rule
    return {
        "recipe": recipe.name,
        "engine": recipe.rollout.engine,
        "policy": subject.policy.name,
        "dtype": str(subject.policy.dtype)[6:],
        "speculation": f"{speculation.method}, k = {speculation.tokens}, rule {rule}",
        "temperature": subject.temperature,
        "effort": asdict(effort),
        "injected_fault": subject.inject,
        "machine": machine_line(describe_environment()),
    }
