"""`forerun bench`: plain decoding against each drafter, k and batch, on this machine; the result is the cost table.

A cell samples the recipe's held-out prompts as a training step does, refilling slots as they free up, plain and
speculative in turns. Round and step seconds are medians over rounds in which every slot was busy; speed-up is tokens
per second of the whole, so that it holds the draining end too. Left out: the decision what to draft (the row budget).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.acceptance.chain import verify
from forerun.acceptance.tree import verify_tree
from forerun.config import Recipe, SpeculationConfig
from forerun.drafters import DRAFTERS, Drafter, load_drafter
from forerun.engine import Counters, Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.events import Note, Work, during
from forerun.models import Policy
from forerun.tasks import load_task
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.prompts import encode, prepare_policy

SCHEMA = 1
WARM_UP_TOKENS = 8


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent drafting and judging."""

    draft_s: float = 0.0
    verify_s: float = 0.0


def timed(call: Callable[..., Any], watch: Stopwatch, hand: str) -> Callable[..., Any]:
    """The same function; its seconds are added to the watch's `hand`."""

    def run(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        setattr(watch, hand, getattr(watch, hand) + time.perf_counter() - started)
        return result

    return run


def timed_drafter(drafter: Drafter, watch: Stopwatch) -> Drafter:
    """The same drafter; what it does in a round is timed from here on."""
    instance: Any = drafter
    for name in ("propose", "observe", "learn"):
        setattr(instance, name, timed(getattr(drafter, name), watch, "draft_s"))
    return drafter


@dataclass(slots=True)
class Turn:
    """One pass over the prompts."""

    tokens: int
    seconds: float
    round_s: float  # median of the rounds with every slot busy
    draft_s: float  # of round_s, by its share of all rounds' time
    verify_s: float  # likewise, the acceptance rule
    context: float  # mean tokens in the cache
    counters: Counters


@dataclass(slots=True)
class Cell:
    """One method at one k and batch. Turns of the plain engine stand beside them."""

    engine: LocalEngine
    watch: Stopwatch
    turns: list[Turn] = field(default_factory=list)

    def run(self, prompts: list[list[int]], sampling: Sampling) -> Turn:
        """Sample every prompt once."""
        before, self.watch.draft_s, self.watch.verify_s = self.engine.counters.copy(), 0.0, 0.0
        rollouts = list(self.engine.stream(prompts, sampling))
        timeline, counters = self.engine.timeline, self.engine.counters.minus(before)
        starts = [0.0, *(seconds for seconds, _ in timeline[:-1])]
        busiest = max(live for _, live in timeline)
        full = [end - start for start, (end, live) in zip(starts, timeline, strict=True) if live == busiest]
        tokens = sum(len(r.tokens) for r in rollouts)
        context = sum(len(r.tokens) * (len(r.prompt_ids) + len(r.tokens) / 2) for r in rollouts) / tokens
        round_s = statistics.median(full)
        share = round_s / timeline[-1][0]
        return Turn(
            tokens,
            counters.seconds,
            round_s,
            share * self.watch.draft_s,
            share * self.watch.verify_s,
            context,
            counters,
        )


def bench_recipe(
    recipe: Recipe,
    methods: Sequence[str],
    ks: Sequence[int],
    batches: Sequence[int],
    drafts: dict[str, str],
    repeats: int,
) -> Work[dict[str, Any]]:
    """Load the recipe's policy and measure; arguments as `bench`. The result is what `bench.json` holds."""
    env = describe_environment()
    task = load_task(recipe.task, recipe.seed)
    with tempfile.TemporaryDirectory() as scratch:
        policy = yield from prepare_policy(recipe, task, Path(scratch))
    prompts = [encode(p, recipe, policy) for p in task.problems("eval")[: 2 * max(batches)]]
    rows = yield from during("bench", bench(recipe, policy, prompts, methods, ks, batches, drafts, repeats))
    return {
        "schema": SCHEMA, "recipe": recipe.name, "policy": policy.name, "dtype": str(policy.dtype)[6:],
        "temperature": recipe.rollout.temperature, "max_new_tokens": recipe.rollout.max_new_tokens,
        "machine": machine_line(env), "versions": env, "rows": rows,
    }  # fmt: skip


def bench(
    recipe: Recipe,
    policy: Policy,
    prompts: list[list[int]],
    methods: Sequence[str],
    ks: Sequence[int],
    batches: Sequence[int],
    drafts: dict[str, str],
    repeats: int,
) -> Work[list[dict[str, Any]]]:
    """Rows of the cost table: the plain step of every batch (k = 0), then every method and k.

    Args:
        prompts: token ids; a batch of b uses the first max(8, 2 b) of them, from the start again where they run out.
        drafts: folder of the drafter by method; the recipe's own serves the recipe's own method.

    Raises:
        UserError: a method needs weights and none are named, or they do not fit the policy.
    """
    rows: list[dict[str, Any]] = []
    for batch in batches:
        some = [prompts[i % len(prompts)] for i in range(max(8, 2 * batch))]
        plain = Cell(LocalEngine(policy, slots=batch), Stopwatch())
        cells = {
            (method, k): _cell(policy, _drafter(recipe, policy, method, drafts), k, recipe.speculation.verify, batch)
            for method in methods
            for k in ks
        }
        for cell in (plain, *cells.values()):
            cell.run(some[:batch], Sampling(WARM_UP_TOKENS, recipe.rollout.temperature))
        for turn in range(repeats):
            sampling = Sampling(recipe.rollout.max_new_tokens, recipe.rollout.temperature, turn)
            for cell in (plain, *cells.values()):
                cell.turns.append(cell.run(some, sampling))
        rows.append(_row("none", 0, batch, plain, plain))
        rows += [_row(method, k, batch, cell, plain) for (method, k), cell in cells.items()]
        for row in rows[-len(cells) :]:
            yield Note(row_text(row))
    return rows


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    positions = " ".join(f"{a:.2f}" for a in row["acceptance_per_position"])
    return (
        f"{row['method']:8} k {row['k']:>2} batch {row['batch']:>3}  {row['speedup']:.2f}x  acceptance length "
        f"{row['acceptance_length']:.2f}  round cost {row['round_cost']:.2f}  ({positions})"
    )


def _drafter(recipe: Recipe, policy: Policy, method: str, drafts: dict[str, str]) -> Drafter:
    own, kind = recipe.speculation, DRAFTERS.load(method)
    data = {**own.model_dump(), "method": method, "draft": drafts.get(method), "k": 1}
    if method == own.method or {method, own.method} == {"graft", "eagle3"}:  # a graft tree stands on an EAGLE-3 head
        data["draft"] = drafts.get(method, own.draft)
    if method != own.method:  # how the recipe's drafter samples suits no other
        data |= {"proposal": "sampled", "draft_temperature": "auto" if kind.samples else 1.0, "settings": {}}
    drafter = load_drafter(policy, SpeculationConfig.model_validate(data))
    assert drafter is not None  # k is 1
    return drafter


def _cell(policy: Policy, drafter: Drafter, k: int, rule: str, batch: int) -> Cell:
    watch = Stopwatch()

    engine = LocalEngine(
        policy, timed_drafter(drafter, watch), k=k, rule=rule, slots=batch,
        verifier=timed(verify, watch, "verify_s"), tree_verifier=timed(verify_tree, watch, "verify_s"),
    )  # fmt: skip
    return Cell(engine, watch)


def _row(method: str, k: int, batch: int, cell: Cell, plain: Cell) -> dict[str, Any]:
    """Medians over the turns; ratios are of the same turn."""

    def median(values: list[float]) -> float:
        return float(statistics.median(values))

    pairs = list(zip(cell.turns, plain.turns, strict=True))
    counters = cell.turns[0].counters
    for turn in cell.turns[1:]:
        counters = counters.plus(turn.counters)
    drafter = cell.engine.drafter
    weights = {} if drafter is None else drafter.state_dict()
    return {
        "method": method, "k": k, "batch": batch,
        "context": median([t.context for t in cell.turns]),
        "plain_step_s": median([p.round_s for _, p in pairs]),
        "round_s": median([t.round_s for t in cell.turns]),
        "draft_s": median([t.draft_s for t in cell.turns]),
        "verify_s": median([t.verify_s for t in cell.turns]),
        "round_cost": median([t.round_s / p.round_s for t, p in pairs]),
        "tokens_per_s": median([t.tokens / t.seconds for t in cell.turns]),
        "plain_tokens_per_s": median([p.tokens / p.seconds for _, p in pairs]),
        "speedup": median([(t.tokens / t.seconds) / (p.tokens / p.seconds) for t, p in pairs]),
        "acceptance_length": counters.acceptance_length or 1.0,
        "acceptance_per_position": counters.acceptance_per_position,
        "drafter_bytes": sum(t.numel() * t.element_size() for t in weights.values()),
    }  # fmt: skip
