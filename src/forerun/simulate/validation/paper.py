"""Every number that 2604.26779 publishes on time, against the simulator's.

Seconds and ratios; each row says whether its published cell was used to calibrate ("calibration") or not ("test"). The
paper does not give batch, lengths, layouts and training tokens: the fields of `Measured` and `Projected` hold our
assumptions and their reasons. Calibrated from the cells that `CALIBRATION` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.simulate.core.constants import serving_constants
from forerun.simulate.core.decode import IDEAL, AnalyticalEngine, RoundConstants, make_drafter
from forerun.simulate.core.hardware import load_hardware
from forerun.simulate.core.operators import Layout, Replica, Tuning
from forerun.simulate.core.rollout import sample_lengths, simulate_rollout
from forerun.simulate.core.shapes import load_model
from forerun.simulate.core.step import (
    AsyncStep,
    Learner,
    Stages,
    async_step,
    best_split,
    forward_flops,
    learner_stages,
    refit_s,
)
from forerun.simulate.core.tables import load_table
from forerun.types import STAGES

Floats = NDArray[np.float64]
Row = dict[str, Any]

CALIBRATION = {
    "Table 1, RL-Zero plain, all five stages": "mean length, data, prepare, MFU of logprob and of training",
    "Table 1, RL-Think plain, generation": "mean length of RL-Think",
    "Table 4, RL-Zero, k = 3 and k = 7": "row_s and slow_row_s of the engine: the two constants of its rounds",
    "Table 2, RL-Zero n-gram": "scan_s, the host's lookup per token of context",
    "Asynchronous run, both plain cells": "size of its batch relative to the synchronous runs, and batches in flight",
    "235B at 512 GPUs, k = 3, alpha = 3": "MFU of training (step cell); the layout was chosen by its rollout cell",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Assumptions on the measured 8B runs, where the paper is silent."""

    sequences: int = 2048  # 64 prompts x 32 samples, defaults of a co-author's GB200 script for NeMo-RL
    cap_tokens: int = 8192  # prompt and response, NeMo-RL's Qwen3-8B recipe on the same data
    sigma: float = 0.8  # spread of the lognormal lengths
    tensor: int = 4  # same recipe
    group: int = 32
    prompt_tokens: int = 150
    gpus: int = 32
    fast_k: int = 3  # draft tokens up to which rows stay on the engine's captured path
    ngram_k: int = 5  # vLLM's documented example


@dataclass(frozen=True, slots=True)
class Projected:
    """Assumptions on the projected 235B runs, where the paper is silent."""

    sequences: int = 4096  # published
    mean_tokens: float = 5700  # NeMo-RL's measured 235B runs
    cap_tokens: int = 8192  # same
    sigma: float = 0.8
    layout: Layout = field(
        default_factory=lambda: Layout(tensor=4, data=16, expert=64)
    )  # one NVL72 domain: attention 16 x TP4, experts over 64
    host_s: float = 1e-3  # a kernel-level simulator has little host time
    group: int = 16
    prompt_tokens: int = 150


def published() -> dict[str, Any]:
    """The published cells."""
    return load_table("paper", "validation")


def _row(table: str, cell: str, unit: str, reference: float, predicted: float, role: str) -> Row:
    error = predicted / reference - 1 if reference else float("nan")
    row = {"table": table, "cell": cell, "unit": unit, "published": reference, "predicted": predicted}
    return row | {"error": error, "role": role}


def _solve(function: Callable[[float], float], target: float, low: float, high: float, steps: int = 25) -> float:
    """The argument at which an increasing function meets a target, by bisection in logarithms."""
    for _ in range(steps):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return float(np.sqrt(low * high))


def _rollout_s(
    engine: AnalyticalEngine,
    assumed: Measured | Projected,
    lengths: Floats,
    k: int,
    alpha: float,
    gpus: int,
    in_flight: float = 0.0,
) -> float:
    """Seconds until one batch is done, or per batch when `in_flight` of them overlap, on all replicas of `gpus`."""
    rollout = simulate_rollout(
        engine,
        lengths,
        replicas=gpus // engine.replica.layout.gpus,
        k=k,
        alpha=alpha if k else 1.0,
        in_flight=in_flight,
        prompt_tokens=assumed.prompt_tokens,
        group=assumed.group,
    )
    return rollout.seconds


class Runs8B:
    """The measured 8B runs: calibrated once, then asked for any cell."""

    def __init__(self, assumed: Measured) -> None:
        self.assumed = assumed
        self.model = load_model("Qwen3-8B")
        self.gpu = load_hardware("GB200")
        self.tuning = serving_constants().tuning(("Qwen3-8B", "GB200", "vllm"), "dense")
        self.rounds = RoundConstants(token_s=0.0, fixed_s=0.0, fast_k=assumed.fast_k)
        plain = {name: cells["plain"]["generation"] for name, cells in published()["stages"].items()}
        self.lengths = {name: self._lengths(seconds) for name, seconds in plain.items()}
        self.rounds = self._round_constants()
        self.learner = self._learner()

    def _engine(self, method: str = "eagle3", rounds: RoundConstants | None = None) -> AnalyticalEngine:
        replica = Replica(self.model, self.gpu, Layout(tensor=self.assumed.tensor), "bf16", 2.0, self.tuning)
        return AnalyticalEngine(replica, make_drafter(method, self.model), rounds or self.rounds)

    def _lengths(self, generation_s: float) -> Floats:
        """Lengths whose plain rollout takes as long as published."""
        a = self.assumed

        def sample(mean_tokens: float) -> Floats:
            return sample_lengths(mean_tokens, a.sigma, a.cap_tokens - a.prompt_tokens, a.sequences)

        engine = self._engine()
        return sample(_solve(lambda m: _rollout_s(engine, a, sample(m), 0, 1.0, a.gpus), generation_s, 50.0, 1e5))

    def generation_s(
        self, workload: str, k: int, alpha: float, method: str = "eagle3", rounds: RoundConstants | None = None
    ) -> float:
        """Seconds of one rollout of a workload; `rounds` None: the calibrated constants."""
        a = self.assumed
        return _rollout_s(self._engine(method, rounds), a, self.lengths[workload], k, alpha, a.gpus)

    def _round_constants(self) -> RoundConstants:
        """`row_s` from RL-Zero's k = 3, `slow_row_s` from its k = 7, the lookup from its n-gram run."""
        plain_s = published()["stages"]["RL-Zero"]["plain"]["generation"]
        cells = {c["k"]: c for c in published()["drafts"] if (c["workload"], c["table"]) == ("RL-Zero", "4")}
        found = self.rounds
        for name, k in (("row_s", 3), ("slow_row_s", 7)):
            found = self._fit(found, name, 10e-6, plain_s / cells[k]["speedup"], k, cells[k]["alpha"], "eagle3")
        lookup = published()["ngram"][0]
        return self._fit(found, "scan_s", 1e-9, lookup["generation_s"], self.assumed.ngram_k, lookup["alpha"], "ngram")

    def _fit(
        self, rounds: RoundConstants, name: str, unit: float, target_s: float, k: int, alpha: float, method: str
    ) -> RoundConstants:
        """`rounds` with the constant `name` such that RL-Zero takes `target_s`: a rollout is linear in each of them."""

        def changed(value: float) -> RoundConstants:
            constants: dict[str, Any] = {name: value}
            return replace(rounds, **constants)

        none_s, unit_s = (self.generation_s("RL-Zero", k, alpha, method, changed(value)) for value in (0.0, unit))
        slope = (unit_s - none_s) / unit
        return changed(max((target_s - none_s) / slope, 0.0) if slope > 0 else 0.0)

    def _learner(self) -> Learner:
        """Constants of the learner from the plain column of RL-Zero; batches are padded to the cap (no packing)."""
        cells, a = published()["stages"]["RL-Zero"]["plain"], self.assumed
        forward_s = forward_flops(self.model, a.sequences, a.cap_tokens) / (a.gpus * self.gpu.flops["bf16"])
        return Learner(
            train_mfu=3.0 * forward_s / cells["train"],
            logprob_mfu=2.0 * forward_s / cells["logprob"],
            prepare_fixed_s=cells["prepare"] - refit_s(self.model),
            data_s=cells["data"],
        )

    def stages(self, generation_s: float, *, gpus: int | None = None, share: float = 1.0) -> Stages:
        """Stages of a step around a generation time; `share` of the synchronous batch on `gpus` training GPUs."""
        a = self.assumed
        sequences = share * a.sequences
        return learner_stages(self.learner, self.model, self.gpu, gpus or a.gpus, sequences, a.cap_tokens, generation_s)

    def asynchronous(self) -> dict[str, AsyncStep]:
        """The asynchronous run: its two plain cells calibrate batch and overlap, the speculative ones are a test.

        A lag of 1 bounds the batches in flight by 1 (strict) and 2 (a collector that starts the next batch while
        the learner still waits for this one).
        """
        cells, alpha = published()["asynchronous"], published()["drafts"][3]["alpha"]
        busy_s = cells["plain"]["step"] - cells["plain"]["exposed"]
        share = _solve(lambda x: self.stages(0.0, gpus=cells["training_gpus"], share=x).learner_s, busy_s, 0.05, 2.0)
        lengths = self.lengths[cells["workload"]]
        batch, engine = lengths[: round(share * len(lengths))], self._engine()

        def run(in_flight: float, k: int) -> AsyncStep:
            generation_s = _rollout_s(engine, self.assumed, batch, k, alpha, cells["generation_gpus"], in_flight)
            return async_step(self.stages(generation_s, gpus=cells["training_gpus"], share=share), cells["lag"])

        fewer = _solve(lambda x: run(1.0 / x, 0).step_s, cells["plain"]["step"], 0.5, 1.0, 15)
        return {"plain": run(1.0 / fewer, 0), "speculative": run(1.0 / fewer, 3)}


@cache
def measured_runs() -> Runs8B:
    """The 8B runs under the default assumptions, calibrated once per process."""
    return Runs8B(Measured())


def round_cost_rows() -> list[Row]:
    """The published costs of a round against ours: the rows of `paper_table` under the unit "steps"."""
    runs = measured_runs()
    return [row for row in (*_draft_rows(runs), *_ngram_rows(runs)) if row["unit"] == "steps"]


def _rows_8b(runs: Runs8B) -> Iterator[Row]:
    yield from _stage_rows(runs)
    yield from _draft_rows(runs)
    yield from _ngram_rows(runs)
    cells, ours = published()["asynchronous"], runs.asynchronous()
    for arm in ("plain", "speculative"):
        role = _role(arm == "plain")
        yield _row("async 8B", f"step, {arm}", "s", cells[arm]["step"], ours[arm].step_s, role)
        yield _row("async 8B", f"exposed generation, {arm}", "s", cells[arm]["exposed"], ours[arm].exposed_s, role)
    yield _row(
        "async 8B", "step speed-up", "x", cells["speedup"], ours["plain"].step_s / ours["speculative"].step_s, "test"
    )


def _stage_rows(runs: Runs8B) -> Iterator[Row]:
    drafts = [c for c in published()["drafts"] if (c["table"], c["k"]) == ("4", 3)]
    alpha = {cell["workload"]: cell["alpha"] for cell in drafts}
    for workload, arms in published()["stages"].items():
        totals = {}
        for arm, cells in arms.items():
            stages = runs.stages(runs.generation_s(workload, 0 if arm == "plain" else 3, alpha[workload]))
            totals[arm] = stages.total_s
            for stage in STAGES:
                plain_or_generation = arm == "plain" or stage == "generation"
                fitted = (workload == "RL-Zero" and plain_or_generation) or (arm, stage) == ("plain", "generation")
                ours_s = getattr(stages, f"{stage}_s")
                yield _row("1", f"{workload} {arm} {stage}", "s", cells[stage], ours_s, _role(fitted))
            role = _role((workload, arm) == ("RL-Zero", "plain"))
            yield _row("1", f"{workload} {arm} overall", "s", sum(cells.values()), stages.total_s, role)
        reference = published()["step_speedup"][workload]
        yield _row("1", f"{workload} step speed-up", "x", reference, totals["plain"] / totals["speculative"], "test")


def _role(fitted: bool) -> str:
    return "calibration" if fitted else "test"


def _draft_rows(runs: Runs8B) -> Iterator[Row]:
    for cell in published()["drafts"]:
        workload, k = cell["workload"], cell["k"]
        ours = runs.generation_s(workload, 0, 1.0) / runs.generation_s(workload, k, cell["alpha"])
        role = _role(cell["table"] == "4" and workload == "RL-Zero" and k in (3, 7))
        yield _row(cell["table"], f"{workload} {cell['variant']} k={k} speed-up", "x", cell["speedup"], ours, role)
        label = f"{workload} {cell['variant']} k={k} round cost"
        published_c = cell["alpha"] / cell["speedup"]
        yield _row(f"{cell['table']} (c)", label, "steps", published_c, cell["alpha"] / ours, role)


def _ngram_rows(runs: Runs8B) -> Iterator[Row]:
    for cell in published()["ngram"]:
        workload = cell["workload"]
        ours_s = runs.generation_s(workload, runs.assumed.ngram_k, cell["alpha"], "ngram")
        ours, role = runs.generation_s(workload, 0, 1.0) / ours_s, _role(workload == "RL-Zero")
        yield _row("2", f"{workload} n-gram generation", "s", cell["generation_s"], ours_s, role)
        yield _row("2", f"{workload} n-gram speed-up", "x", cell["speedup"], ours, role)
        published_c = cell["alpha"] / cell["speedup"]
        yield _row("2 (c)", f"{workload} n-gram round cost", "steps", published_c, cell["alpha"] / ours, role)


class Runs235B:
    """The projected 235B runs under an engine without round overhead, as a kernel-level simulator has."""

    def __init__(self, assumed: Projected) -> None:
        self.assumed = assumed
        self.model = load_model("Qwen3-235B-A22B")
        self.gpu = load_hardware("GB200")
        tuning = Tuning(host_s=assumed.host_s, sequence_s=0.0)
        replica = Replica(self.model, self.gpu, assumed.layout, "fp8", 1.0, tuning)
        self.engine = AnalyticalEngine(replica, make_drafter("eagle3", self.model), IDEAL)
        cap = assumed.cap_tokens - assumed.prompt_tokens
        self.lengths = sample_lengths(assumed.mean_tokens, assumed.sigma, cap, assumed.sequences)
        self.learner = self._learner()

    def rollout_s(self, k: int, alpha: float, gpus: int, in_flight: float = 0.0) -> float:
        """Seconds until one batch is done, or per batch when `in_flight` of them overlap."""
        return _rollout_s(self.engine, self.assumed, self.lengths, k, alpha, gpus, in_flight)

    def _learner(self) -> Learner:
        """One MFU for training and two logprob passes, so that the step cell of k = 3 at 512 GPUs is met."""
        cell = published()["projection_512"][0]
        plain_s, ours_s = self.rollout_s(0, 1.0, 512), self.rollout_s(cell["k"], cell["alpha"], 512)
        # 1 / (R / S + 1 - R) = step  =>  the learner's share of the plain step
        share = (1 - 1 / cell["step"]) / (1 - ours_s / plain_s)
        work_s = plain_s * (1 - share) / share - refit_s(self.model)
        forward = forward_flops(self.model, self.assumed.sequences, self.assumed.cap_tokens)
        mfu = 5.0 * forward / (work_s * 512 * self.gpu.flops["bf16"])
        return Learner(mfu, mfu, prepare_fixed_s=0.0, data_s=0.0)

    def stages(self, generation_s: float, training_gpus: int) -> Stages:
        """Stages around a generation time."""
        a = self.assumed
        return learner_stages(
            self.learner, self.model, self.gpu, training_gpus, a.sequences, a.cap_tokens, generation_s
        )

    def at_2048(self) -> dict[str, float]:
        """Lag 2 on 2,048 GPUs, split as is best with speculation; both arms on that split."""
        cell = published()["projection_2048"]
        k, alpha, lag = cell["k"], cell["alpha"], cell["lag"]

        def stages_of(generating: int, training: int, k: int, alpha: float) -> Stages:
            return self.stages(self.rollout_s(k, alpha, generating, lag), training)

        best = best_split(2048, self.assumed.layout.gpus, lag, partial(stages_of, k=k, alpha=alpha))
        own = best_split(2048, self.assumed.layout.gpus, lag, partial(stages_of, k=0, alpha=1.0))
        gpus = best.generation_gpus
        plain = async_step(stages_of(gpus, best.training_gpus, 0, 1.0), lag)
        return {
            "rollout": self.rollout_s(0, 1.0, gpus) / self.rollout_s(k, alpha, gpus),
            "step": plain.step_s / best.step.step_s,
            "step_own_splits": own.step.step_s / best.step.step_s,
            "rollout_all_gpus": self.rollout_s(0, 1.0, 2048) / self.rollout_s(k, alpha, 2048),
            "rollout_throughput": self.rollout_s(0, 1.0, gpus, lag) / self.rollout_s(k, alpha, gpus, lag),
            "generation_gpus": float(gpus),
        }


def _rows_235b(runs: Runs235B) -> Iterator[Row]:
    plain_s = runs.rollout_s(0, 1.0, 512)
    for index, cell in enumerate(published()["projection_512"]):
        ours_s = runs.rollout_s(cell["k"], cell["alpha"], 512)
        step = runs.stages(plain_s, 512).total_s / runs.stages(ours_s, 512).total_s
        role = _role(index == 0)
        label = f"k={cell['k']} alpha={cell['alpha']:g}"
        yield _row("235B, 512 GPUs", f"{label} rollout", "x", cell["rollout"], plain_s / ours_s, role)
        yield _row("235B, 512 GPUs", f"{label} step", "x", cell["step"], step, role)
    cell, ours = published()["projection_2048"], runs.at_2048()
    for name in ("rollout", "step"):
        yield _row("235B, 2,048 GPUs, lag 2", name, "x", cell[name], ours[name], "test")


def sensitivity() -> list[Row]:
    """Each assumption changed alone: median and worst error of the test ratios that depend on it."""
    measured = {
        "as assumed": Measured(),
        "sequences 4096": Measured(sequences=4096),
        "sigma 0.5": Measured(sigma=0.5),
        "sigma 1.1": Measured(sigma=1.1),
        "tensor 8": Measured(tensor=8),
        "cap 12,288": Measured(cap_tokens=12288),
        "fast_k 1,000 (no slow path)": Measured(fast_k=1000),
        "ngram_k 4": Measured(ngram_k=4),
        "ngram_k 6": Measured(ngram_k=6),
    }
    projected = {
        "as assumed": Projected(),
        "layout TP8 EP8": Projected(layout=Layout(8, 1, 8)),
        "layout DP32 EP32": Projected(layout=Layout(1, 32, 32)),
        "host 0 ms": Projected(host_s=0.0),
        "host 3 ms": Projected(host_s=3e-3),
        "mean 4,000, cap 16,384": Projected(mean_tokens=4000, cap_tokens=16384),
        "sigma 0.5": Projected(sigma=0.5),
    }
    rows = [_moved("8B", change, _rows_8b(Runs8B(assumed))) for change, assumed in measured.items()]
    return rows + [_moved("235B", change, _rows_235b(Runs235B(assumed))) for change, assumed in projected.items()]


def _moved(model: str, change: str, rows: Iterator[Row]) -> Row:
    tests = [row for row in rows if row["role"] == "test" and row["unit"] == "x"]
    sizes = np.array([abs(row["error"]) for row in tests])
    worst = tests[int(np.argmax(sizes))]
    found = {"model": model, "change": change, "median": float(np.median(sizes)), "worst": float(sizes.max())}
    return found | {"worst_cell": f"{worst['table']}: {worst['cell']}"}


def paper_table() -> dict[str, Any]:
    """Every published number against ours, the calibration, the assumptions and their sensitivity, as plain data."""
    projected = Runs235B(Projected())
    rows = [*_rows_8b(measured_runs()), *_rows_235b(projected)]
    return {
        "rows": rows,
        "calibration": dict(CALIBRATION),
        "assumptions": {"8B": asdict(Measured()), "235B": asdict(Projected())},
        "sensitivity": sensitivity(),
        "other_readings_of_2048": projected.at_2048(),
        "beyond_10_percent": [row for row in rows if row["role"] == "test" and not abs(row["error"]) <= 0.10],
    }
