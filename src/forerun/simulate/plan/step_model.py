"""The step of one spec: its layout, engine and learner, and the times that all answers are made of.

Seconds per step; `k` draft tokens, 0: plain. Generation of a fixed k is prefill plus decode at α = 1 over α, so that
one simulated drain per k answers for every acceptance. Two kinds of hardware: accelerators by name, with an analytical
engine and a learner of an assumed MFU, or one machine with a `CostModel`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.constants import group_of, round_constants, round_cost_error, serving_constants
from forerun.simulate.core.cost_model import CostModel, LearnerWork
from forerun.simulate.core.decode import (
    METHODS,
    AnalyticalEngine,
    Drafter,
    EngineCosts,
    RoundConstants,
    acceptance_from_lengths,
    constant_acceptance,
    make_drafter,
)
from forerun.simulate.core.hardware import Hardware, load_hardware, peak_flops
from forerun.simulate.core.operators import Layout, Replica, cache_room_bytes, cache_tokens, check_layout
from forerun.simulate.core.rollout import RolloutResult, sample_lengths, simulate_rollout, trace_lengths
from forerun.simulate.core.shapes import ModelShape, load_model
from forerun.simulate.core.step import Learner, Split, Stages, async_step, best_split, learner_stages
from forerun.simulate.plan.spec import PlanSpec

Floats = NDArray[np.float64]
K_MAX = 8
DENSE_MFU = 0.35
EXPERTS_MFU = 0.20


class StepModel:
    """One spec, with everything that the answers share."""

    def __init__(
        self,
        spec: PlanSpec,
        costs: EngineCosts | None = None,
        machine: CostModel | None = None,
        model: ModelShape | None = None,
    ) -> None:
        """`costs` replaces the analytical engine, `machine` engine and learner, `model` the shape of the name."""
        self.spec = spec
        self.machine = machine
        self.model = model or load_model(spec.model)
        self.gpu = machine.hardware if machine else load_hardware(spec.gpu)
        lengths = spec.acceptance_lengths
        self.acceptance = acceptance_from_lengths(lengths) if lengths else constant_acceptance(spec.acceptance)
        self.lengths = _lengths(spec)
        self.drafter = drafter_of(spec, self.model, measured=costs is not None or machine is not None)
        self.layout = self._layout()
        self.costs = costs or (machine.engine if machine else self.analytical_engine(round_constants(spec.rounds)))
        self.learner = self._learner()
        self._rollouts: dict[tuple[int, int, int], RolloutResult] = {}

    def _layout(self) -> Layout:
        spec = self.spec
        peak_flops(self.gpu, spec.precision)
        if spec.gpus < 1:
            raise UserError(f"gpus={spec.gpus} cannot run anything; give 1 at least.")
        if self.machine is not None:
            layout = Layout()
        elif not spec.tensor:
            return auto_layout(self.model, self.gpu, spec, spec.prompt_tokens + float(self.lengths.max()))
        else:
            expert = spec.expert or (spec.tensor * spec.data if self.model.experts else 1)
            layout = Layout(spec.tensor, spec.data, expert)
        check_layout(Replica(self.model, self.gpu, layout, spec.precision))
        if self.machine is None:
            _check_gpus(spec.gpus, layout.gpus)
        return layout

    def _learner(self) -> Learner:
        mfu = self.spec.train_mfu or (EXPERTS_MFU if self.model.experts else DENSE_MFU)
        if not 0 < mfu <= 1:
            raise UserError(f"train_mfu={mfu} cannot be; it is a share between 0 and 1.")
        return Learner(mfu, mfu, self.spec.logprob_passes)

    def analytical_engine(self, rounds: RoundConstants) -> AnalyticalEngine:
        """The spec's engine from its operators, under given round constants."""
        replica = Replica(self.model, self.gpu, self.layout, self.spec.precision)
        tuning = serving_constants().tuning(group_of(replica, self.spec.engine), self.model.family)
        return AnalyticalEngine(replace(replica, tuning=tuning), self.drafter, rounds)

    @property
    def provenance(self) -> str:
        """One sentence: where the engine's constants come from, and how many rows they were fitted on."""
        if self.machine is not None:
            return self.machine.origin
        if not isinstance(self.costs, AnalyticalEngine):
            return "The engine's costs were fitted to measurements of this engine."
        found = serving_constants().find(group_of(self.costs.replica, self.spec.engine), self.model.family)
        if found is None:
            return f"No measured rows of {self.spec.engine!r}: default constants, expect larger errors."
        vague = ", ".join(found.not_identified) or "none"
        return f"Engine constants: fitted on {found.rows} measured rows; not identified by them: {vague}."

    def rollout(self, k: int, gpus: int, lag: int) -> RolloutResult:
        """One batch in rounds of k that yield one token: a drain, or with lag the overlap of `lag` batches."""
        key = (k, gpus, lag)
        if key not in self._rollouts:
            self._rollouts[key] = simulate_rollout(
                self.costs,
                self.lengths,
                replicas=max(gpus // self.layout.gpus, 1),
                k=k,
                in_flight=lag,
                prompt_tokens=self.spec.prompt_tokens,
                group=self.spec.samples,
                slots=self.spec.slots,
            )
        return self._rollouts[key]

    def generation_s(self, k: int, gpus: int, lag: int, alpha: float | None = None) -> float:
        """Seconds of generation per step; `alpha` None: the spec's at k."""
        rollout = self.rollout(k, gpus, lag)
        decode_s = rollout.seconds - rollout.prefill_s
        return rollout.prefill_s + decode_s / (self.alpha(k) if alpha is None else alpha)

    def alpha(self, k: int) -> float:
        """Acceptance length at k."""
        return float(self.acceptance.length(k))

    @property
    def cost_error(self) -> float:
        """Relative error to expect of the cost of a round."""
        return self.machine.cost_band if self.machine else round_cost_error()

    @cached_property
    def work(self) -> LearnerWork:
        """The learner's work in one step of one machine."""
        spec = self.spec
        tokens = len(self.lengths) * (spec.prompt_tokens + float(self.lengths.mean()))
        return LearnerWork(tokens, spec.logprob_passes, spec.train_passes, spec.updates, spec.trained)

    def stages(self, k: int, generating: int, training: int, lag: int, alpha: float | None = None) -> Stages:
        """The five stages on `generating` and `training` GPUs or machines."""
        generation_s = self.generation_s(k, generating, lag, alpha)
        if self.machine is not None:
            return self.machine.stages(self.work, generation_s, training)
        padded = self.spec.prompt_tokens + float(self.lengths.max())
        return learner_stages(self.learner, self.model, self.gpu, training, len(self.lengths), padded, generation_s)

    def split(self, k: int, gpus: int | None = None, lag: int | None = None) -> Split:
        """All GPUs do both without lag; with lag, the split that is best for this k. None: the spec's."""
        gpus = self.spec.gpus if gpus is None else gpus
        lag = self.spec.lag if lag is None else lag
        if lag == 0:
            stages = self.stages(k, gpus, gpus, 0)
            return Split(gpus, gpus, async_step(stages, 0), stages)
        return best_split(gpus, self.layout.gpus, lag, lambda g, t: self.stages(k, g, t, lag))

    def best_k(self) -> int:
        """The k with the shortest step."""
        return min(range(K_MAX + 1), key=lambda k: (self.split(k).step.step_s, k))


def _lengths(spec: PlanSpec) -> Floats:
    if spec.prompts < 1 or spec.samples < 1 or spec.prompt_tokens < 1:
        raise UserError(
            f"prompts={spec.prompts}, samples={spec.samples} and prompt_tokens={spec.prompt_tokens} cannot all be; "
            "each must be 1 at least."
        )
    if spec.trace:
        return np.resize(trace_lengths(spec.trace), spec.prompts * spec.samples)
    return sample_lengths(spec.mean_tokens, spec.sigma, spec.cap_tokens, spec.prompts * spec.samples)


def drafter_of(spec: PlanSpec, model: ModelShape, measured: bool) -> Drafter:
    """The spec's drafter, without a shape where only measurements know it. Raises UserError for an unknown one."""
    if measured and spec.method not in METHODS:
        return Drafter(spec.method)
    draft = load_model(spec.draft) if spec.draft else None
    return make_drafter(spec.method, model, draft, spec.draft_vocab)


def auto_layout(model: ModelShape, gpu: Hardware, spec: PlanSpec, sequence_tokens: float) -> Layout:
    """The smallest power-of-two replica that caches 16 sequences, all GPUs at most. Raises UserError if none fits."""
    size = 1
    replica = Replica(model, gpu, Layout(), spec.precision)
    while size <= spec.gpus and model.heads % size == 0:
        replica = Replica(model, gpu, Layout(size, 1, size if model.experts else 1), spec.precision)
        if cache_room_bytes(replica) > 0 and cache_tokens(replica) >= 16 * sequence_tokens:
            return replica.layout
        size *= 2
    check_layout(replica)
    return replica.layout


def _check_gpus(gpus: int, unit: int) -> None:
    if gpus < unit:
        raise UserError(f"One replica takes {unit} GPUs, but there are {gpus}; use a smaller tensor or data size.")
    if gpus % unit:
        near = gpus // unit * unit
        raise UserError(f"{gpus} GPUs cannot be filled with replicas of {unit}; {near} can.")
