"""Cost tables of made-up engines, as `forerun bench` would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from forerun.simulate.core.decode import LinearEngine


def bench_rows(engine: LinearEngine, noise: float = 0.0) -> list[dict[str, Any]]:
    """A cost table's rows as an engine of known constants would leave them."""
    rng, rows = np.random.default_rng(0), []
    for batch in (1, 4, 16):
        for context in (64, 256, 512):
            for k in (0, 1, 3, 5):
                draft_s = k * engine.draft_s(batch, context)
                values = [engine.plain_s(batch, context), engine.round_s(batch, k, context), draft_s]
                plain, round_, draft = (float(v) * np.exp(noise * rng.standard_normal()) for v in values)
                row = {"method": "eagle3" if k else "none", "k": k, "batch": batch, "context": context}
                rates = [0.7**j for j in range(1, k + 1)]
                row |= {"acceptance_length": 1 + sum(rates), "acceptance_per_position": rates, "plain_step_s": plain}
                rows.append(row | {"round_s": round_, "draft_s": draft, "verify_s": 0.001} if k else row)
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The file of such rows."""
    path.write_text(json.dumps({"machine": "CPU", "versions": {"torch": "2"}, "policy": "tiny", "rows": rows}))
    return path
