"""What is planned: the planner's own keys, read from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from forerun.errors import UserError
from forerun.simulate.core.tables import nearest


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What is planned. `k` None asks for the best; `tensor` 0 lets the planner choose the smallest replica."""

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
    train_passes: float = 3.0  # of one machine's learner, in forward passes; 4 where activations are recomputed
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
    """A spec from recipe-like keys. Raises UserError for an unknown key or for text where a number belongs."""
    chosen = {SYNONYMS.get(key, key): value for key, value in values.items()}
    known = [f.name for f in fields(PlanSpec)]
    for key in chosen:
        if key not in known:
            raise UserError(f"The planner has no key {key!r}; the nearest is {nearest(key, known)!r}.")
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


def check_k_and_lag(spec: PlanSpec) -> None:
    """Refuse a negative k or lag with a UserError that says what zero means."""
    if spec.k is not None and spec.k < 0:
        raise UserError(f"k = {spec.k} draft tokens cannot be; 0 is plain decoding.")
    if spec.lag < 0:
        raise UserError(f"A policy lag of {spec.lag} cannot be; 0 is synchronous.")
