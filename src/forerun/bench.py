"""`forerun bench`: plain decoding against each drafter, k and batch, on this machine; the result is the cost table.

A cell samples the recipe's held-out prompts as a training step does, refilling slots as they free up, plain and
speculative in turns. Round and step seconds are medians over rounds in which every slot was busy; speed-up is tokens
per second of the whole pass, its draining end included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.acceptance.chain import verify
from forerun.acceptance.tree import verify_tree
from forerun.config import Recipe, SpeculationConfig
from forerun.drafters import DRAFTERS, Drafter, load_drafter
from forerun.engine import Counters, Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.events import EventStream, Note, as_stage
from forerun.models import Policy
from forerun.report.format import times
from forerun.tracking.environment import describe_environment, machine_line
from forerun.training.data import prepare_data
from forerun.training.prompts import encode, prepare_policy

SCHEMA = 1
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured."""

    methods: Sequence[str]
    ks: Sequence[int]
    batches: Sequence[int]
    repeats: int  # passes per cell; every figure is their median
    drafts: Mapping[str, str] = field(default_factory=dict)  # folder of the drafter by method; else the recipe's own


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent drafting and verifying."""

    draft_s: float = 0.0
    verify_s: float = 0.0


def timed(call: Callable[..., Any], watch: Stopwatch, counter: str) -> Callable[..., Any]:
    """The same function; its seconds are added to the watch's `counter`."""

    def run(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        setattr(watch, counter, getattr(watch, counter) + time.perf_counter() - started)
        return result

    return run


def timed_drafter(drafter: Drafter, watch: Stopwatch) -> Drafter:
    """The same drafter, its work in a round timed."""
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

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the whole pass."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class Cell:
    """One method at one k and batch, and its turns."""

    engine: LocalEngine
    watch: Stopwatch
    turns: list[Turn] = field(default_factory=list)

    def run(self, prompts: list[list[int]], sampling: Sampling) -> Turn:
        """Sample every prompt once."""
        before = self.engine.counters.copy()
        self.watch.draft_s = 0.0
        self.watch.verify_s = 0.0
        rollouts = list(self.engine.stream(prompts, sampling))
        timeline = self.engine.timeline
        counters = self.engine.counters.minus(before)
        tokens = sum(len(r.tokens) for r in rollouts)
        round_s = full_round_s(timeline)
        share = round_s / timeline[-1][0]
        return Turn(
            tokens=tokens,
            seconds=counters.seconds,
            round_s=round_s,
            draft_s=share * self.watch.draft_s,
            verify_s=share * self.watch.verify_s,
            context=sum(len(r.tokens) * (len(r.prompt_ids) + len(r.tokens) / 2) for r in rollouts) / tokens,
            counters=counters,
        )


def full_round_s(timeline: Sequence[tuple[float, int]]) -> float:
    """Median seconds of the rounds with the most live sequences; `timeline`: (end of a round, live sequences)."""
    starts = [0.0, *(end for end, _ in timeline[:-1])]
    most = max(live for _, live in timeline)
    return statistics.median(end - start for start, (end, live) in zip(starts, timeline, strict=True) if live == most)


def bench_recipe(recipe: Recipe, grid: Grid) -> EventStream[dict[str, Any]]:
    """Load the recipe's policy and measure. The result is what `bench.json` holds."""
    env = describe_environment()
    task = (yield from prepare_data(recipe)).task
    with tempfile.TemporaryDirectory() as scratch:
        policy = yield from prepare_policy(recipe, task, Path(scratch))
    prompts = [encode(problem, recipe, policy) for problem in task.problems("eval")[: 2 * max(grid.batches)]]
    rows = yield from as_stage("bench", bench(recipe, policy, prompts, grid))
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "policy": policy.name,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "temperature": recipe.rollout.temperature,
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "machine": machine_line(env),
        "versions": env,
        "rows": rows,
    }


def bench(recipe: Recipe, policy: Policy, prompts: list[list[int]], grid: Grid) -> EventStream[list[dict[str, Any]]]:
    """Rows of the cost table: the plain step of every batch (k = 0), then every method and k.

    Args:
        prompts: token ids; a batch of b uses the first max(8, 2 b) of them, from the start again where they run out.

    Raises:
        UserError: a method needs weights and none are named, or they do not fit the policy.
    """
    rows: list[dict[str, Any]] = []
    for batch in grid.batches:
        some = [prompts[i % len(prompts)] for i in range(max(8, 2 * batch))]
        plain, cells = _measured(recipe, policy, some, grid, batch)
        rows.append(_row("none", 0, batch, plain, plain))
        for (method, k), cell in cells.items():
            row = _row(method, k, batch, cell, plain)
            rows.append(row)
            yield Note(row_text(row))
    return rows


def _measured(
    recipe: Recipe, policy: Policy, prompts: list[list[int]], grid: Grid, batch: int
) -> tuple[Cell, dict[tuple[str, int], Cell]]:
    """The plain cell of a batch and those of every method and k, in turns."""
    rollout = recipe.rollout
    plain = Cell(LocalEngine(policy, slots=batch), Stopwatch())
    cells = {
        (method, k): _cell(policy, _drafter(recipe, policy, method, grid.drafts), k, recipe.speculation.verify, batch)
        for method in grid.methods
        for k in grid.ks
    }
    for cell in (plain, *cells.values()):
        cell.run(prompts[:batch], Sampling(WARM_UP_TOKENS, rollout.temperature))
    for turn in range(grid.repeats):
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, turn)
        for cell in (plain, *cells.values()):
            cell.turns.append(cell.run(prompts, sampling))
    return plain, cells


def row_text(row: dict[str, Any]) -> str:
    """One line of the table."""
    positions = " ".join(f"{rate:.2f}" for rate in row["acceptance_per_position"])
    return (
        f"{row['method']:8} k {row['k']:>2} batch {row['batch']:>3}  {times(row['speedup'])}  acceptance length "
        f"{row['acceptance_length']:.2f}  round cost {row['round_cost']:.2f}  ({positions})"
    )


def _drafter(recipe: Recipe, policy: Policy, method: str, drafts: Mapping[str, str]) -> Drafter:
    own = recipe.speculation
    data = {**own.model_dump(), "method": method, "draft": drafts.get(method), "k": 1}
    if method == own.method or {method, own.method} == {"graft", "eagle3"}:  # a graft tree needs an EAGLE-3 head
        data["draft"] = drafts.get(method, own.draft)
    if method != own.method:  # sampling settings of the recipe's drafter suit no other
        samples = DRAFTERS.load(method).samples
        data |= {"proposal": "sampled", "draft_temperature": "auto" if samples else 1.0, "settings": {}}
    drafter = load_drafter(policy, SpeculationConfig.model_validate(data))
    assert drafter is not None  # k is 1
    return drafter


def _cell(policy: Policy, drafter: Drafter, k: int, rule: str, batch: int) -> Cell:
    watch = Stopwatch()
    engine = LocalEngine(
        policy,
        timed_drafter(drafter, watch),
        k=k,
        rule=rule,
        slots=batch,
        verifier=timed(verify, watch, "verify_s"),
        tree_verifier=timed(verify_tree, watch, "verify_s"),
    )
    return Cell(engine, watch)


def _row(method: str, k: int, batch: int, cell: Cell, plain: Cell) -> dict[str, Any]:
    """Medians over the turns; ratios are of the same turn."""
    pairs = list(zip(cell.turns, plain.turns, strict=True))
    counters = cell.turns[0].counters
    for turn in cell.turns[1:]:
        counters = counters.plus(turn.counters)
    drafter = cell.engine.drafter
    weights = {} if drafter is None else drafter.state_dict()
    return {
        "method": method,
        "k": k,
        "batch": batch,
        "context": _median(turn.context for turn in cell.turns),
        "plain_step_s": _median(turn.round_s for turn in plain.turns),
        "round_s": _median(turn.round_s for turn in cell.turns),
        "draft_s": _median(turn.draft_s for turn in cell.turns),
        "verify_s": _median(turn.verify_s for turn in cell.turns),
        "round_cost": _median(turn.round_s / other.round_s for turn, other in pairs),
        "tokens_per_s": _median(turn.tokens_per_s for turn in cell.turns),
        "plain_tokens_per_s": _median(turn.tokens_per_s for turn in plain.turns),
        "speedup": _median(turn.tokens_per_s / other.tokens_per_s for turn, other in pairs),
        "acceptance_length": counters.acceptance_length or 1.0,
        "acceptance_per_position": counters.acceptance_per_position,
        "drafter_bytes": sum(t.numel() * t.element_size() for t in weights.values()),
    }


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))
