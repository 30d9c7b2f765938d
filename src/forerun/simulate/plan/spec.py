"""One planned recipe: its shapes, layout, engine and learner, and the times that all answers are made of.

Conventions: seconds per step; `k` draft tokens, 0 plain; generation of a fixed k is prefill plus decode at α = 1
over α, so one simulated drain per k answers for every acceptance. Two kinds of hardware: accelerators by name, with an
analytical engine and a learner of an assumed MFU, or a `Machine` whose constants stand for both.
Left out: the search over training layouts (their effect is the MFU).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.decode import (
    IDEAL,
    Acceptance,
    Costs,
    Drafter,
    RoundTuning,
    Speculator,
    acceptance_from_lengths,
    constant_acceptance,
    fixed_budget,
    make_drafter,
    with_vocab,
)
from forerun.simulate.core.hardware import load_hardware, peak_flops
from forerun.simulate.core.machine import Machine, Work
from forerun.simulate.core.operators import Layout, Replica, cache_room_bytes, cache_tokens, check_layout
from forerun.simulate.core.rollout import Lengths, mean_prefill_s, simulate_rollout, stream_s, trace_lengths
from forerun.simulate.core.shapes import ModelShape, load_model
from forerun.simulate.core.step import Learner, Split, Stages, async_step, best_split, learner_stages
from forerun.simulate.plan.calibrate import shipped_constants
from forerun.simulate.validation import paper
from forerun.simulate.validation.round_costs import fit_rounds, round_cost, round_points

Floats = NDArray[np.float64]
K_MAX = 8
ROUNDS = ("rl", "serving", "ideal")


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What is planned. `k` None asks for the best; a zero in `tensor` lets the planner choose the smallest replica."""

    model: str = "Qwen3-8B"
    gpu: str = "H100"
    gpus: int = 8
    engine: str = "vllm"
    precision: str = "bf16"
    tensor: int = 0
    data: int = 1
    expert: int = 0
    prompts: int = 64
    samples: int = 16
    prompt_tokens: int = 150
    mean_tokens: float = 3000.0
    sigma: float = 0.8
    cap_tokens: int = 8192
    trace: tuple[float, ...] = ()  # output lengths of a real run instead of the distribution
    slots: int = 256
    lag: int = 0
    method: str = "eagle3"
    draft: str = ""
    draft_vocab: int = 0  # of an EAGLE-3 head; 0: that of the published heads
    k: int | None = None
    acceptance: float = 0.75  # conditional rate per position
    acceptance_lengths: Mapping[int, float] = field(default_factory=dict)  # measured α by k, instead of the rate
    rounds: str = "rl"  # whose round constants: a large RL run, a small-batch server, or none
    train_mfu: float = 0.0  # 0: 0.35 dense, 0.20 experts, of padded tokens (calibrated on 2604.26779)
    logprob_passes: float = 2.0
    train_passes: float = 3.0  # of a machine's learner, in forward passes; 4 where activations are recomputed
    updates: int = 1  # optimizer updates per step, likewise
    trained: float = 1.0  # share of the tokens whose advantage is not zero, likewise


SYNONYMS = {"hardware": "gpu"}
KINDS: dict[str, Any] = {
    f.name: {"int": int, "int | None": int | None, "float": int | float}[str(f.type)]
    for f in fields(PlanSpec)
    if f.type in ("int", "int | None", "float")
}


def spec_keys() -> list[str]:
    """The keys that `spec_from_dict` knows."""
    return [*(f.name for f in fields(PlanSpec)), *SYNONYMS]


def spec_from_dict(values: Mapping[str, Any]) -> PlanSpec:
    """A spec from recipe-like keys.

    Raises:
        UserError: an unknown key, with the nearest one, or a word where a number belongs.
    """
    values = {SYNONYMS.get(key, key): value for key, value in values.items()}
    known = [f.name for f in fields(PlanSpec)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"The planner has no key {key!r}; the nearest is {near!r}.")
    chosen = dict(values)
    if chosen.get("k") == "auto":
        chosen["k"] = None
    for name, kind in KINDS.items():
        if name in chosen and (isinstance(chosen[name], bool) or not isinstance(chosen[name], kind)):
            raise UserError(f"{name}={chosen[name]!r} is no {'number' if kind == int | float else 'whole number'}.")
    if "acceptance_lengths" in chosen:
        chosen["acceptance_lengths"] = {int(k): float(v) for k, v in chosen["acceptance_lengths"].items()}
    if "trace" in chosen:
        chosen["trace"] = tuple(float(x) for x in chosen["trace"])
    return PlanSpec(**chosen)


@cache
def round_tuning(name: str) -> RoundTuning:
    """Round constants by name: "rl" (fitted to 2604.26779's RL-Zero), "serving" (SGLang on small batches), "ideal".

    Raises:
        UserError: another name.
    """
    if name == "rl":
        return paper.measured_runs().rounds
    if name == "serving":
        return fit_rounds(round_points())["sglang specforge"]
    if name == "ideal":
        return IDEAL
    raise UserError(f"There are no round constants called {name!r}; there are {', '.join(ROUNDS)}.")


@cache
def round_error() -> float:
    """The 90th percentile of the relative error of c on published points that no constant was fitted to.

    Engines are taken with the constants of all their heads together: nobody knows those of a head not yet measured.
    """
    points = round_points()
    tunings = fit_rounds(points)
    ours = [abs(round_cost(point, tunings[point.engine]) / point.c - 1) for point in points if not point.fitted]
    runs = [abs(row["error"]) for row in paper.round_cost_rows() if row["role"] == "test"]
    return float(np.quantile(ours + runs, 0.9))


def auto_layout(model: ModelShape, gpu_name: str, gpus: int, precision: str, sequences_tokens: float) -> Layout:
    """The smallest power-of-two replica whose cache holds 16 sequences of `sequences_tokens`.

    Raises:
        UserError: no replica of at most `gpus` GPUs fits.
    """
    gpu = load_hardware(gpu_name)
    size, replica = 1, Replica(model, gpu, Layout(), precision)
    while size <= gpus and model.heads % size == 0:
        replica = Replica(model, gpu, Layout(size, 1, size if model.experts else 1), precision)
        if cache_room_bytes(replica) > 0 and cache_tokens(replica) >= 16 * sequences_tokens:
            return replica.layout
        size *= 2
    check_layout(replica)
    return replica.layout


class Planner:
    """One spec, with everything that the answers share."""

    def __init__(
        self,
        spec: PlanSpec,
        costs: Costs | None = None,
        machine: Machine | None = None,
        model: ModelShape | None = None,
    ) -> None:
        """`costs` replaces the analytical engine, `machine` engine and learner; `model` the shape that the name has."""
        self.spec, self.machine, self.model = spec, machine, model or load_model(spec.model)
        self.gpu = machine.hardware if machine else load_hardware(spec.gpu)
        self.acceptance = self._acceptance()
        self.lengths = self._lengths()
        self.drafter = self._drafter()
        self.layout = self._layout()
        self.costs = costs or (machine.engine if machine else self.speculator(round_tuning(spec.rounds)))
        self.learner = self._learner()
        self._known: dict[tuple[int, int, int], tuple[float, float, float]] = {}

    def _acceptance(self) -> Acceptance:
        spec = self.spec
        if spec.acceptance_lengths:
            return acceptance_from_lengths(dict(spec.acceptance_lengths))
        return constant_acceptance(spec.acceptance)

    def _lengths(self) -> Floats:
        spec = self.spec
        if spec.prompts < 1 or spec.samples < 1 or spec.prompt_tokens < 1:
            raise UserError(
                f"prompts={spec.prompts}, samples={spec.samples} and prompt_tokens={spec.prompt_tokens} cannot all be; "
                "each must be 1 at least."
            )
        if spec.trace:
            return np.resize(trace_lengths(spec.trace), spec.prompts * spec.samples)
        return Lengths(spec.mean_tokens, spec.sigma, spec.cap_tokens).sample(spec.prompts * spec.samples)

    def _drafter(self) -> Drafter:
        spec = self.spec
        draft = load_model(spec.draft) if spec.draft else None
        return with_vocab(make_drafter(spec.method, self.model, draft=draft), spec.draft_vocab)

    def _layout(self) -> Layout:
        spec = self.spec
        peak_flops(self.gpu, spec.precision)
        if spec.gpus < 1:
            raise UserError(f"gpus={spec.gpus} cannot run anything; give 1 at least.")
        if self.machine is not None:
            check_layout(Replica(self.model, self.gpu, Layout(), spec.precision))
            return Layout()
        longest = spec.prompt_tokens + float(self.lengths.max())
        if not spec.tensor:
            return auto_layout(self.model, spec.gpu, spec.gpus, spec.precision, longest)
        expert = spec.expert or (spec.tensor * spec.data if self.model.experts else 1)
        layout = Layout(spec.tensor, spec.data, expert)
        check_layout(Replica(self.model, self.gpu, layout, spec.precision))
        if spec.gpus < layout.gpus:
            raise UserError(
                f"One replica takes {layout.gpus} GPUs, but there are {spec.gpus}; use a smaller tensor or data size."
            )
        if spec.gpus % layout.gpus:
            near = spec.gpus // layout.gpus * layout.gpus
            raise UserError(f"{spec.gpus} GPUs cannot be filled with replicas of {layout.gpus}; {near} can.")
        return layout

    def speculator(self, rounds: RoundTuning) -> Speculator:
        """The analytical engine of the spec under given round constants."""
        spec, constants = self.spec, shipped_constants()
        tuning = constants.tuning(self._group(), self._family())
        replica = Replica(self.model, self.gpu, self.layout, spec.precision, tuning=tuning)
        return Speculator(replica, self.drafter, rounds)

    def _group(self) -> tuple[str, str, str]:
        precision = "" if self.spec.precision == "bf16" else f" {self.spec.precision}"
        return (self.model.name + precision, self.gpu.name, self.spec.engine)

    def _family(self) -> str:
        return "experts" if self.model.experts else "dense"

    @property
    def provenance(self) -> str:
        """One sentence: whose constants the engine runs on, and how many rows stand behind them."""
        if self.machine is not None:
            return self.machine.origin
        if not isinstance(self.costs, Speculator):
            return "The engine's costs were fitted to measurements of this engine."
        found = shipped_constants().find(self._group(), self._family())
        if found is None:
            return f"No measured rows of {self.spec.engine!r}: default constants, expect larger errors."
        vague = ", ".join(found.not_identified) or "none"
        return f"Engine constants: fitted on {found.rows} measured rows; not identified by them: {vague}."

    def _learner(self) -> Learner:
        mfu = self.spec.train_mfu or (0.20 if self.model.experts else 0.35)
        if not 0 < mfu <= 1:
            raise UserError(f"train_mfu={mfu} cannot be; it is a share between 0 and 1.")
        return Learner(mfu, mfu, self.spec.logprob_passes)

    def batch_s(self, k: int, gpus: int, lag: int) -> tuple[float, float, float]:
        """Of one batch: prefill seconds, decode seconds at α = 1, and (without lag) the mean running batch."""
        if (k, gpus, lag) not in self._known:
            self._known[k, gpus, lag] = self._stream(k, gpus, lag) if lag else self._drain(k, gpus)
        return self._known[k, gpus, lag]

    def _drain(self, k: int, gpus: int) -> tuple[float, float, float]:
        result = simulate_rollout(
            self.costs,
            self.lengths,
            replicas=max(gpus // self.layout.gpus, 1),
            budget=fixed_budget(k),
            acceptance=constant_acceptance(0.0),
            prompt_tokens=self.spec.prompt_tokens,
            group=self.spec.samples,
            slots=self.spec.slots,
        )
        return result.prefill_s, result.seconds - result.prefill_s, result.mean_batch

    def _stream(self, k: int, gpus: int, lag: int) -> tuple[float, float, float]:
        spec, replicas = self.spec, max(gpus // self.layout.gpus, 1)
        prefill_s = mean_prefill_s(self.costs, len(self.lengths), replicas, spec.prompt_tokens, spec.samples)
        total_s = stream_s(
            self.costs,
            self.lengths,
            replicas=replicas,
            in_flight=lag,
            budget=fixed_budget(k),
            acceptance=constant_acceptance(0.0),
            prompt_tokens=spec.prompt_tokens,
            group=spec.samples,
            slots=spec.slots,
        )
        return prefill_s, total_s - prefill_s, 0.0

    def generation_s(self, k: int, gpus: int, lag: int, alpha: float | None = None) -> float:
        """Seconds of generation per step: a drain, or with lag the overlap of `lag` batches."""
        prefill_s, decode_s, _ = self.batch_s(k, gpus, lag)
        return prefill_s + decode_s / (self.alpha(k) if alpha is None else alpha)

    def alpha(self, k: int) -> float:
        """Acceptance length at k."""
        return float(self.acceptance.length(k))

    @property
    def cost_error(self) -> float:
        """Relative error to expect of the cost of a round."""
        return self.machine.cost_band if self.machine else round_error()

    @property
    def work(self) -> Work:
        """What a machine's learner does in one step."""
        spec = self.spec
        tokens = len(self.lengths) * (spec.prompt_tokens + float(self.lengths.mean()))
        return Work(tokens, spec.logprob_passes, spec.train_passes, spec.updates, spec.trained)

    def stages(self, k: int, generating: int, training: int, lag: int, alpha: float | None = None) -> Stages:
        """The five stages."""
        generation_s = self.generation_s(k, generating, lag, alpha)
        if self.machine is not None:
            return self.machine.stages(self.work, generation_s, training)
        padded = self.spec.prompt_tokens + float(self.lengths.max())
        return learner_stages(self.learner, self.model, self.gpu, training, len(self.lengths), padded, generation_s)

    def split(self, k: int, gpus: int, lag: int) -> Split:
        """All GPUs do both without lag; with lag, the split that is best for this k."""
        if lag == 0:
            stages = self.stages(k, gpus, gpus, 0)
            return Split(gpus, gpus, async_step(stages, 0), stages)
        return best_split(gpus, self.layout.gpus, lag, lambda g, t: self.stages(k, g, t, lag))
