"""The cost model of one machine: seconds of a decode pass, a round, a scored token and a trained token.

A `band` is the relative error to expect of some seconds: they are between seconds / (1 + band) and seconds x (1 +
band). Constants come from the hardware's peaks (`nominal_cost_model`), a cost table of `forerun bench`, or a finished
run (both: `plan/calibrate.py`). Engines on several GPUs are analytical (`decode.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from forerun.simulate.core.decode import Drafter, LinearEngine
from forerun.simulate.core.hardware import Hardware, peak_flops
from forerun.simulate.core.operators import WEIGHT_BYTES
from forerun.simulate.core.shapes import ModelShape
from forerun.simulate.core.step import Stages, forward_flops

CPU_LAYER_S = 0.25e-3  # a layer of small tensors: 0.2-0.3 ms on the CPUs that `hardware.cpu` was fitted to
GPU_LAYER_S = 0.3e-3  # launches from Python, never measured
PASS_S = 2e-3  # the loop around a pass
ROUND_FIXED_S = 2e-3  # acceptance and bookkeeping of a round
CHECKSUM_BYTES_PER_S = 1.3e9  # weights are summed twice per version
OPTIMIZER_BYTES = 40.0  # moved per parameter and update: master, two moments, gradient, weight
NOMINAL_BAND = 1.0  # a factor of 2 on seconds
NOMINAL_COST_BAND = 0.4  # on the cost of a round


@dataclass(frozen=True, slots=True)
class LearnerWork:
    """What the learner computes in one step."""

    tokens: float  # of prompts and answers
    score_passes: float = 1.0  # 2 with a reference policy
    train_passes: float = 3.0  # in forward passes: 3, or 4 where activations are recomputed
    updates: float = 1.0
    trained: float = 1.0  # share of the tokens whose advantage is not zero


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of one machine. `engine` generates; the other constants are the learner's."""

    hardware: Hardware
    precision: str
    engine: LinearEngine
    score_token_s: float  # one forward pass over one token of prompt or answer
    train_token_s: float  # forward and backward of one
    update_s: float  # per optimizer update
    prepare_s: float
    data_s: float
    band: float  # of the learner's stages
    engine_band: float  # of generation
    cost_band: float  # of c, the cost of a round in plain steps
    origin: str  # a sentence
    reward_s: float = 0.0  # the reward functions' part of the generation stage
    drafter_s: float = 0.0  # the drafter's part of the train stage, where it is trained during the run

    def stages(self, work: LearnerWork, generation_s: float, machines: float = 1.0) -> Stages:
        """The five stages of a step; `machines` share the learner's work."""
        trained_s = work.trained * work.tokens * work.train_passes / 3.0 * self.train_token_s
        return Stages(
            data_s=self.data_s,
            prepare_s=self.prepare_s,
            generation_s=generation_s + self.reward_s,
            logprob_s=work.tokens * work.score_passes * self.score_token_s / machines,
            train_s=(trained_s + work.updates * self.update_s * (work.trained > 0)) / machines + self.drafter_s,
        )


def nominal_cost_model(
    hardware: Hardware, model: ModelShape, drafter: Drafter, precision: str, context: float = 256.0
) -> CostModel:
    """The cost model of a machine of which only the peaks are known.

    Args:
        context: mean tokens that a sequence has cached; the learner's attention is priced there.

    Raises:
        UserError: the hardware does not multiply in this precision.
    """
    peak_flops(hardware, precision)
    rate, bandwidth, layer_s = _reached(hardware, precision)
    score_s = forward_flops(model, 1, 2 * context) / (2 * context) / rate
    return CostModel(
        hardware=hardware,
        precision=precision,
        engine=_nominal_engine(hardware, model, drafter, precision),
        score_token_s=score_s,
        train_token_s=3 * score_s,
        update_s=OPTIMIZER_BYTES * model.params / bandwidth + model.layers * layer_s,
        prepare_s=2 * model.params * WEIGHT_BYTES[precision] / CHECKSUM_BYTES_PER_S,
        data_s=5e-3,
        band=NOMINAL_BAND,
        engine_band=NOMINAL_BAND,
        cost_band=NOMINAL_COST_BAND,
        origin=f"Nothing was measured on this machine: nominal figures of {_peaks(hardware, precision)}, "
        f"so read every time as right within a factor of {1 + NOMINAL_BAND:.0f}.",
    )


def _reached(hardware: Hardware, precision: str) -> tuple[float, float, float]:
    """FLOP/s and bytes/s that a small engine reaches, and its overhead in seconds per layer and pass."""
    fit = hardware.gemm[precision]
    layer_s = CPU_LAYER_S if hardware.name == "CPU" else GPU_LAYER_S
    return fit.compute_share * hardware.flops[precision], fit.bandwidth_share * hardware.memory_bytes_per_s, layer_s


def _nominal_engine(hardware: Hardware, model: ModelShape, drafter: Drafter, precision: str) -> LinearEngine:
    """Weights and launches once per pass, arithmetic per row, cache per sequence and token."""
    rate, bandwidth, layer_s = _reached(hardware, precision)
    value_bytes = WEIGHT_BYTES[precision]
    read = model.active_body_params + model.vocab * model.hidden
    row_s = forward_flops(model, 1, 1) / rate
    draft_fixed_s = draft_row_s = 0.0
    shape = drafter.shape
    if shape is not None:
        draft_fixed_s = shape.active_params * value_bytes / bandwidth + 2 * shape.layers * layer_s
        draft_row_s = forward_flops(shape, 1, 1) / rate
    return LinearEngine(
        step_s=read * value_bytes / bandwidth + model.layers * layer_s + PASS_S,
        sequence_s=row_s,
        cached_s=model.cache_bytes_per_token(value_bytes) / bandwidth,
        verify_fixed_s=ROUND_FIXED_S,
        row_s=row_s,
        draft_fixed_s=draft_fixed_s,
        draft_row_s=draft_row_s,
        prompt_token_s=row_s,
        capacity_tokens=0.5 * hardware.memory_bytes / model.cache_bytes_per_token(value_bytes),
    )


def _peaks(hardware: Hardware, precision: str) -> str:
    rate, bandwidth = hardware.flops[precision], hardware.memory_bytes_per_s
    name = "this CPU" if hardware.name == "CPU" else f"one {hardware.name}"
    return f"{name} ({rate / 1e9:,.0f} GFLOP/s in {precision}, {bandwidth / 1e9:,.0f} GB/s)"
