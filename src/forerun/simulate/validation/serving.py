"""Measured serving rows: read, predicted, and engine constants fitted on half of them.

Columns as in aiconfigurator's `silicon_sample.csv`; `batch_size` counts concurrent requests on the replica; time per
output token contains the prefill of the other requests (closed loop, fixed lengths). The measured time to first token
is not read. Not supported: pipeline parallel layouts, disaggregated prefill.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forerun.errors import UserError
from forerun.simulate.core.constants import TUNING_NAMES, FittedConstants, Group, ServingConstants, group_of
from forerun.simulate.core.fitting import map_fit
from forerun.simulate.core.hardware import load_hardware, peak_flops
from forerun.simulate.core.operators import (
    Layout,
    Replica,
    Tuning,
    cache_room_bytes,
    cache_tokens,
    forward_s,
    host_s,
    prefill_s,
)
from forerun.simulate.core.shapes import load_model

Floats = NDArray[np.float64]
Key = tuple[str, ...]

COLUMNS = (
    *("backend", "backend_version", "model_path", "system", "gemm_quant_mode", "isl", "osl", "batch_size"),
    *("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "silicon_tpot_ms"),
)
GROWTH_SHARE = 0.7  # of the output length for which an engine reserves cache when it admits requests
SPLIT_RULE = "fit where crc32('model|gpu|backend|isl|osl|batch') is even, test where it is odd"
# Prior spread of each constant, in logarithms: for an engine and model family, then for a group around it.
SPREADS = {
    "host_s": (0.7, 0.7),
    "sequence_s": (1.0, 0.7),
    "overhead": (0.5, 0.4),
    "memory": (0.15, 0.1),
    "cache": (0.3, 0.25),
    "compute": (0.3, 0.25),
    "link": (0.5, 0.4),
    "experts": (0.4, 0.35),
}
ENGINE, GROUP = 0, 1


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One measured point. `engine` names backend and version; the replica carries model, GPU and layout."""

    engine: str
    replica: Replica
    prompt_tokens: int
    output_tokens: int
    batch: int
    measured_s: float

    @property
    def family(self) -> str:
        """Operator family: "dense" or "experts"."""
        return self.replica.model.family

    @property
    def group(self) -> Group:
        """Rows that share an engine's constants: model, GPU, engine."""
        return group_of(self.replica, self.engine)

    @property
    def fitted(self) -> bool:
        """The split rule: the parity of the CRC-32 of a row's configuration.

        Model, GPU, backend, lengths and batch count, version and layout do not: repeated measurements and the same
        point under another label fall into the same half.
        """
        key = (self.replica.model.name, self.replica.gpu.name, self.engine.split()[0])
        numbers = (self.prompt_tokens, self.output_tokens, self.batch)
        return zlib.crc32("|".join(map(str, key + numbers)).encode()) % 2 == 0


def read_rows(path: str | Path) -> tuple[list[ServingRow], list[str]]:
    """Read a table of measured rows.

    Returns:
        The rows that the model covers, and one sentence for each row that it does not.

    Raises:
        UserError: the file is missing, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No measured rows at {path}; give a CSV file with the columns {', '.join(COLUMNS)}.")
    rows: list[ServingRow] = []
    skipped: list[str] = []
    with path.open(newline="") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path} lacks the columns {', '.join(missing)}; it needs {', '.join(COLUMNS)}.")
        for number, record in enumerate(reader, 2):
            try:
                rows.append(_parse({name: value or "" for name, value in record.items() if isinstance(name, str)}))
            except (UserError, ValueError, OverflowError) as error:
                skipped.append(f"line {number}: {error}")
    return rows, skipped


def _parse(record: dict[str, str]) -> ServingRow:
    if _count(record["pp_size"], 1) > 1:
        raise UserError(f"pipeline size {record['pp_size']} is not modelled; rows with pp_size 1 are.")
    if not record["backend"] or "disagg" in record.get("id", ""):
        raise UserError(f"backend {record['backend']!r} with split prefill is not modelled; aggregated serving is.")
    precision = _precision(record["gemm_quant_mode"] or "")
    model = load_model(record["model_path"])
    # TensorRT-LLM's fp8 checkpoints also store the cache in fp8; vLLM and SGLang keep it in two bytes.
    cache_value_bytes = 1.0 if precision == "fp8" and record["backend"] == "trtllm" else 2.0
    gpu, layout = load_hardware(record["system"]), _layout(record, model.experts is not None)
    peak_flops(gpu, precision)
    replica = Replica(model, gpu, layout, precision, cache_value_bytes)
    numbers = [int(float(record[key])) for key in ("isl", "osl", "batch_size")]
    measured_s = float(record["silicon_tpot_ms"]) / 1e3
    if min(numbers) < 1 or measured_s <= 0:
        raise UserError(
            f"isl, osl, batch_size = {numbers} and silicon_tpot_ms = {record['silicon_tpot_ms']} must all be positive."
        )
    engine = f"{record['backend']} {record['backend_version']}".strip()
    return ServingRow(engine, replica, numbers[0], numbers[1], numbers[2], measured_s)


def _precision(mode: str) -> str:
    if mode.startswith("fp8"):
        return "fp8"
    if mode in ("", "float16", "bfloat16", "bf16", "fp16"):
        return "bf16"
    raise UserError(f"weights in {mode!r} are not modelled; bf16 and fp8 are.")


def _count(text: str, default: int) -> int:
    return int(float(text)) if text and float(text) > 0 else default


def _layout(record: dict[str, str], is_moe: bool) -> Layout:
    """Read the five parallel sizes. Two quirks of the source are undone.

    "64 / 8 / 8" is TP8 with EP8 (the same measurements appear under both labels), and a tensor size beyond one
    8-GPU board is attention copied per GPU with experts spread over all of them.
    """
    tp, dp = _count(record["tp_size"], 1), _count(record["attention_dp_size"], 1)
    moe_tp, moe_ep = _count(record["moe_tp_size"], 1), _count(record["moe_ep_size"], 1)
    if not is_moe:
        return Layout(tensor=tp)
    if max(tp, dp) == moe_tp * moe_ep and moe_tp > 1 and moe_ep > 1:
        tp, dp, moe_tp = min(tp, moe_ep), min(dp, moe_ep), 1
    if tp > 8:
        return Layout(tensor=1, data=tp, expert=tp)
    gpus = max(tp * dp, moe_tp * moe_ep)
    return Layout(tensor=tp, data=gpus // tp, expert=moe_ep)


def predict_s(rows: Sequence[ServingRow], tuning: Tuning) -> Floats:
    """Predicted seconds per output token of rows that share an engine, in their order."""
    predicted = np.zeros(len(rows))
    for members in indices_by(rows, _replica_key).values():
        replica = replace(rows[members[0]].replica, tuning=tuning)
        prompt, output, batch = (
            np.array([getattr(rows[i], name) for i in members], dtype=float)
            for name in ("prompt_tokens", "output_tokens", "batch")
        )
        predicted[members] = _output_token_s(replica, prompt, output, batch)
    return predicted


def indices_by(rows: Sequence[ServingRow], key_of: Callable[[ServingRow], Key]) -> dict[Key, list[int]]:
    """The indices of the rows with each key, in order of appearance."""
    found: dict[Key, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(key_of(row), []).append(index)
    return found


def _replica_key(row: ServingRow) -> Key:
    r = row.replica
    return (r.model.name, r.gpu.name, str(r.layout), r.precision, str(r.cache_value_bytes))


def _output_token_s(replica: Replica, prompt: Floats, output: Floats, batch: Floats) -> Floats:
    """Eq. 9: decode iteration plus, once per output, the prefill of the other requests."""
    # A measured row did run: where our estimate leaves no room for a cache, its batch is not cut.
    room_tokens = cache_tokens(replica) if cache_room_bytes(replica) > 0 else np.inf
    running = np.minimum(batch, np.maximum(room_tokens / (prompt + GROWTH_SHARE * output), 1.0))
    decode_s = forward_s(replica, running, 1.0, prompt + output / 2) + host_s(replica, running)
    others = np.maximum(running / replica.layout.data - 1.0, 0.0)
    return decode_s + others / output * prefill_s(replica, prompt)


def fit_serving(rows: Sequence[ServingRow]) -> ServingConstants:
    """Fit each engine and model family, then each (model, GPU, engine) around it, on the rows whose `fitted` holds."""
    chosen = [row for row in rows if row.fitted]
    engines, groups = {}, {}
    for key, members in indices_by(chosen, _engine_key).items():
        engines[key] = _fit([chosen[i] for i in members], Tuning(), ENGINE)
    for key, members in indices_by(chosen, lambda row: row.group).items():
        prior = engines[_engine_key(chosen[members[0]])].tuning
        groups[key] = _fit([chosen[i] for i in members], prior, GROUP)
    return ServingConstants(engines, groups)


def _engine_key(row: ServingRow) -> Key:
    return (row.family, row.engine.split()[0])


def _fit(rows: Sequence[ServingRow], prior: Tuning, level: int) -> FittedConstants:
    measured = np.array([row.measured_s for row in rows])
    centre = np.array([getattr(prior, name) for name in TUNING_NAMES])
    spread = np.array([SPREADS[name][level] for name in TUNING_NAMES])
    fit = map_fit(lambda x: predict_s(rows, Tuning(*x)), measured, centre, spread)
    return FittedConstants(Tuning(*map(float, fit.values)), len(rows), fit.unidentified(TUNING_NAMES))
