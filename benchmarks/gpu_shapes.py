"""Rounds of the local engine for a policy and a drafter of a given shape, with random weights and random caches.

A case is one batch at one context. Its cache is filled with random numbers in place of a prefill, and every k of the
case runs over the same cache, from the same lengths, in turns. The engine's own `_round` is timed: drafting, forward,
verification, and the bookkeeping on the host. Random weights accept almost nothing, so after the real verification its
verdict is replaced: each draft token stands with probability `ACCEPTANCE_RATE` after one that stands. What a round
costs depends on that only through the drafter, which reads the accepted tokens; no acceptance is measured here.
Needs torch and Transformers only. Axes: B rows of a batch, k draft tokens, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forerun.acceptance.chain import verify
from forerun.drafters.eagle3 import Eagle3Config, Eagle3Drafter, Eagle3Head
from forerun.engine.base import Sampling
from forerun.engine.local.engine import LocalEngine
from forerun.engine.local.scheduler import LiveSequence, Scheduler, request_seed
from forerun.models import Policy
from forerun.models.auxiliary import default_aux_layers
from forerun.models.cache import SlotCache
from forerun.types import VerifyInput, VerifyResult

ACCEPTANCE_RATE = 0.7
LENGTHS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)  # acceptance lengths for which the speed-up is worked out
Case = tuple[int, int]  # batch, context


@dataclass(frozen=True, slots=True)
class Shape:
    """A policy's configuration, its drafter's vocabulary, and what is measured of them, most important case first."""

    name: str
    policy: dict[str, Any]  # of Qwen3Config
    draft_vocabulary: int
    dtype: torch.dtype
    ks: tuple[int, ...]
    cases: tuple[Case, ...]
    turns: int = 5  # the median is over them
    rounds: int = 3  # per turn

    @property
    def spare(self) -> int:
        """Places of a row beyond the context: what one turn can write."""
        return (self.rounds + 1) * (max(self.ks) + 1)


QWEN3_8B = Shape(
    "Qwen3-8B",
    {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
    32000,
    torch.bfloat16,
    (1, 2, 3, 4, 6, 8),
    (
        (1, 4096), (32, 4096), (256, 512), (1, 512), (32, 512), (64, 4096), (8, 4096), (128, 512), (8, 512), (64, 512),
        (16, 4096), (16, 512), (4, 4096), (4, 512), (2, 4096), (2, 512), (128, 4096), (256, 4096),
    ),
)  # fmt: skip
TOY = Shape(
    "toy",
    {
        "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    40,
    torch.float32,
    (1, 3),
    ((1, 32), (4, 32), (2, 96)),
    rounds=2,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Models:
    """Policy and drafter of a shape, on the device."""

    shape: Shape
    policy: Policy
    head: Eagle3Head

    @property
    def cuda(self) -> bool:
        return self.policy.device.type == "cuda"


def make_models(shape: Shape, device: str) -> Models:
    """Both with random weights, made on `device` in the shape's number format: no copy of the policy elsewhere."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**shape.policy)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
        head = Eagle3Head(_head_config(config, shape.draft_vocabulary)).to(shape.dtype)
        step = config.vocab_size // shape.draft_vocabulary
        head.set_vocabulary(torch.arange(shape.draft_vocabulary) * step)
    policy = Policy(model.eval().requires_grad_(False), None, shape.name)
    return Models(shape, policy, head.eval().requires_grad_(False))


def _head_config(config: Any, draft_vocabulary: int) -> Eagle3Config:
    """One decoder layer as wide as the policy's."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    aux_layers = default_aux_layers(config.num_hidden_layers)
    return Eagle3Config(
        **{name: getattr(config, name) for name in names}, draft_vocab_size=draft_vocabulary, layers=aux_layers
    )


def round_bytes(models: Models, batch: int, context: int, k: int) -> int:
    """Bytes that a round cannot help reading: the weights once and the keys and values of all rows.

    The policy's embedding table is left out where its head has one of its own (B rows of it are read). A draft adds the
    fusion once, and per draft token the head's layer, its output head and its keys and values. Writes and activations
    are left out.
    """
    model, head = models.policy.model, models.head
    tied = model.config.tie_word_embeddings
    weights = _weight_bytes(model) - (0 if tied else _weight_bytes(model.get_input_embeddings()))
    policy = weights + batch * context * cache_bytes(models)[0]
    draft = _weight_bytes(head) - _weight_bytes(head.fc) + batch * context * cache_bytes(models)[1]
    return policy + (_weight_bytes(head.fc) + k * draft if k else 0)


def cache_bytes(models: Models) -> tuple[int, int]:
    """Bytes per token in the caches of the policy and of the drafter."""
    config, size = models.policy.model.config, models.policy.dtype.itemsize
    layer = 2 * config.num_key_value_heads * config.head_dim * size
    return config.num_hidden_layers * layer, layer


def case_bytes(models: Models, case: Case) -> int:
    """Memory that a case takes beside the weights: both caches, and the largest tensors of a round at the largest k."""
    batch, context = case
    shape, k = models.shape, max(models.shape.ks)
    caches = batch * (context + shape.spare) * sum(cache_bytes(models))
    config, size = models.policy.model.config, models.policy.dtype.itemsize
    logits = batch * (k + 1) * config.vocab_size * size
    log_q = 3 * 4 * batch * k * shape.draft_vocabulary  # float32: drawn from, stacked, exponentiated
    layer = batch * (k + 1) * (3 * config.intermediate_size + 6 * len(models.head.config.layers) * config.hidden_size)
    return caches + logits + log_q + layer * size


def _weight_bytes(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def synthetic(rule: str, inputs: VerifyInput) -> VerifyResult:
    """The real verification, whose counts are then replaced by geometric ones; arguments as `verify`."""
    result, tokens, uniforms = verify(rule, inputs), inputs.draft.tokens, inputs.accept_uniforms
    accepted = (uniforms < ACCEPTANCE_RATE).long().cumprod(1).sum(1)  # [B]
    kept = torch.arange(uniforms.shape[1], device=uniforms.device) < accepted[:, None]
    drafted = torch.where(kept, tokens, result.tokens[:, :1])
    return VerifyResult(accepted, torch.cat([drafted, result.tokens[:, :1]], dim=1), result.logprobs)


@dataclass(slots=True)
class Watch:
    """Seconds of parts of a round: between CUDA events on a GPU, by the clock elsewhere."""

    cuda: bool
    _spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call; its time is added to `part`."""

        def run(*arguments: Any) -> Any:
            start = self._now()
            result = call(*arguments)
            self._spans.setdefault(part, []).append((start, self._now()))
            return result

        return run

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; the device must be idle."""
        spans, self._spans = self._spans, {}
        if self.cuda:
            return {part: sum(a.elapsed_time(b) for a, b in pairs) / 1e3 for part, pairs in spans.items()}
        return {part: sum(b - a for a, b in pairs) for part, pairs in spans.items()}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(slots=True)
class Cell:
    """One k of a case."""

    k: int
    engine: LocalEngine
    watch: Watch
    round_s: list[float] = field(default_factory=list)  # of every turn
    parts: list[dict[str, float]] = field(default_factory=list)

    def turn(self, case: Case, rounds: int, keep: bool) -> None:
        """Run `rounds` rounds from the case's context."""
        scheduler = _schedule(case)
        sampling = Sampling(max_new_tokens=1 << 20, temperature=1.0, ignore_eos=True)
        synchronize(self.watch.cuda)
        self.watch.take()
        started = time.perf_counter()
        for _ in range(rounds):
            self.engine._round(scheduler, sampling)
        synchronize(self.watch.cuda)
        seconds = (time.perf_counter() - started) / rounds
        parts = {part: s / rounds for part, s in self.watch.take().items()}
        if keep:
            self.round_s.append(seconds)
            self.parts.append(parts)


def synchronize(cuda: bool) -> None:
    """Wait until the device has done what it was given."""
    if cuda:
        torch.cuda.synchronize()


def _schedule(case: Case) -> Scheduler:
    """Every row live, with `context` tokens in the cache and one newest token."""
    batch, context = case
    scheduler = Scheduler(batch, [], [], 0)
    prompt = [1] * (context + 1)
    scheduler.live = [LiveSequence(prompt, row, 0, request_seed(0, row, 0)) for row in range(batch)]
    return scheduler


def random_cache(rows: int, positions: int, layers: int, like: Tensor) -> SlotCache:
    """A cache of `layers` layers full of normal random numbers; `like` [1, K, 1, D] as for `SlotCache.layer`."""
    cache = SlotCache(rows, positions)
    for index in range(layers):
        for tensor in cache.layer(index, like):
            tensor.normal_()
    return cache


def make_cells(models: Models, case: Case) -> list[Cell]:
    """Plain twice (the second tells the noise), then every k; all over one cache."""
    batch, context = case
    config, positions = models.policy.model.config, context + models.shape.spare
    like = torch.empty(1, config.num_key_value_heads, 1, config.head_dim, dtype=models.policy.dtype)
    like = like.to(models.policy.device)
    cache = random_cache(batch, positions, config.num_hidden_layers, like)
    drafts = random_cache(batch, positions, 1, like)
    return [_cell(models, batch, k, cache, drafts) for k in (0, 0, *models.shape.ks)]


def _cell(models: Models, batch: int, k: int, cache: SlotCache, drafts: SlotCache) -> Cell:
    watch = Watch(models.cuda)
    drafter = _drafter(models, batch, k, drafts, watch) if k else None
    judge = watch.timed("verify_s", synthetic if k else verify)
    engine: Any = LocalEngine(models.policy, drafter, k=k, rule="block", slots=batch, verifier=judge)
    engine._cache, engine._forward = cache, watch.timed("forward_s", engine._forward)
    return Cell(k, engine, watch)


def _drafter(models: Models, batch: int, k: int, cache: SlotCache, watch: Watch) -> Eagle3Drafter:
    """A drafter that has a verified token of every row to read, as after a prefill."""
    drafter: Any = Eagle3Drafter(models.head, models.policy)
    drafter.open(batch, cache.positions, k)
    drafter.cache = cache
    drafter._features.normal_()
    drafter.pending.fill_(1)
    drafter.propose = watch.timed("draft_s", drafter.propose)
    drafter.observe = watch.timed("draft_s", drafter.observe)
    return drafter


@torch.no_grad()
def measure_case(models: Models, case: Case, peak: float | None, check: Callable[[], None]) -> list[dict[str, Any]]:
    """One row per k, k = 0 first.

    Args:
        peak: the device's memory bandwidth in bytes/s, None: not known.
        check: called between turns; what it raises ends the case.
    """
    shape, cells = models.shape, make_cells(models, case)
    for turn in range(shape.turns + 1):
        for cell in cells:
            check()
            cell.turn(case, shape.rounds, keep=turn > 0)  # the first turn warms up
    plain, again, *drafted = cells
    rows = [_row(models, case, plain, again, peak)]
    return rows + [_row(models, case, plain, cell, peak) for cell in drafted]


def _row(models: Models, case: Case, plain: Cell, cell: Cell, peak: float | None) -> dict[str, Any]:
    costs = [s / p for s, p in zip(cell.round_s, plain.round_s, strict=True)]
    cost, round_s = statistics.median(costs), statistics.median(cell.round_s)
    read = round_bytes(models, *case, cell.k)
    return {
        "batch": case[0], "context": case[1], "k": cell.k,
        "plain_round_s": statistics.median(plain.round_s), "round_s": round_s,
        "round_cost": cost, "round_cost_range": [min(costs), max(costs)],
        **{part: _median_part(cell, part) for part in ("forward_s", "verify_s", "draft_s")},
        "bytes": read, **bandwidth(read, round_s, peak),
        "speedup_at_acceptance_length": {str(a): a / cost for a in LENGTHS if a <= cell.k + 1},
    }  # fmt: skip


def _median_part(cell: Cell, part: str) -> float:
    return statistics.median(parts.get(part, 0.0) for parts in cell.parts)


def bandwidth(read: int, seconds: float, peak: float | None) -> dict[str, float | None]:
    """The time that reading so many bytes takes at the peak, and its share of the seconds that it took."""
    if peak is None:
        return {"floor_s": None, "bandwidth_share": None}
    return {"floor_s": read / peak, "bandwidth_share": read / peak / seconds}


def refusal(needed: int, room: float, case: Case) -> str | None:
    """Why a case is not run: its memory against the room there is; None where it fits."""
    if needed <= room:
        return None
    have = f"{room / 1e9:.3g} GB are free"
    return f"{case[0]} rows of {case[1]} tokens need {needed / 1e9:.3g} GB beside the weights; {have}"


def cases_text(cases: Sequence[Case]) -> list[dict[str, int]]:
    """Cases as JSON."""
    return [{"batch": batch, "context": context} for batch, context in cases]
